"""EESD checkpoints: what is written, what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import specrt
from specrt.config import ModelConfig
from specrt.draft.eesd.checkpoint import (
    ExitConfig,
    exit_tensor_shapes,
    is_exit_checkpoint,
    load_exit,
    read_exit,
    write_exit,
)
from specrt.draft.eesd.drafter import EesdDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.draft.length.control import ControlOptions
from specrt.models.model import LlamaModel
from specrt.types import CheckpointError
from tests.checkpoints import (
    edit_config,
    edit_tensors,
    make_checkpoint,
    make_draft_checkpoint,
    make_exit_checkpoint,
)
from tests.engine.support import make_model


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eesd") / "target"
    make_checkpoint("llama", path)
    return path


@pytest.fixture(scope="module")
def model(target: Path) -> LlamaModel:
    return make_model(target)


@pytest.fixture
def path(target: Path, tmp_path: Path) -> Path:
    make_exit_checkpoint(target, tmp_path / "exit", 2)
    return tmp_path / "exit"


def load(path: Path, model: LlamaModel) -> EesdDrafter:
    drafter = load_drafter(path, model, None, DrafterOptions())
    assert isinstance(drafter, EesdDrafter)
    return drafter


def test_what_is_written_is_read(path: Path, model: LlamaModel, target: Path) -> None:
    assert is_exit_checkpoint(path)
    assert not is_exit_checkpoint(target)
    config = read_exit(path, model.config)
    assert config.exit_layer == 2
    assert config.target_name == "tiny"
    weights = load_exit(path, config, model.weights)
    last = model.weights.layers[-1]
    assert weights.layer.layers[0].qkv.equal(last.qkv)
    assert weights.layer.layers[0].down.equal(last.down)
    assert weights.layer.final_norm.equal(model.weights.final_norm)
    assert weights.layer.lm_head.equal(model.weights.lm_head)
    assert weights.calibration.shape == (2, 64)


def test_the_checkpoints_dtype_stays(path: Path, model: LlamaModel) -> None:
    edit_config(path, dtype="bfloat16")
    config = read_exit(path, model.config)
    weights = load_exit(path, config, model.weights)
    assert weights.layer.layers[0].qkv.dtype == torch.bfloat16
    assert weights.layer.lm_head.dtype == torch.bfloat16
    assert weights.calibration.dtype == torch.float32


def test_unknown_keys_are_kept(path: Path, tmp_path: Path, model: LlamaModel) -> None:
    edit_config(path, training={"num_steps": 7})
    config = read_exit(path, model.config)
    assert config.extra == {"training": {"num_steps": 7}}
    tensors = {key: torch.zeros(shape) for key, shape in exit_tensor_shapes(config).items()}
    write_exit(tmp_path / "again", config, tensors)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (path / "config.json").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_layer": 0}, r"config.json: exit_layer: expected 1..2, got 0"),
        ({"exit_layer": 3}, r"exit_layer: expected 1..2, got 3"),
        ({"exit_layer": True}, r"exit_layer: expected 1..2, got True"),
        ({"format_version": 9}, r"format_version: this version reads 1, got 9"),
        ({"dtype": "int8"}, r"dtype: expected float32, bfloat16 or float16, got 'int8'"),
        ({"target": {"name": "x", "fingerprint": "0"}}, r"made for another target \(\('x', '0'\)"),
        ({"target": None}, r"made for another target"),
        ({"target": 5}, r"made for another target \(5;"),
    ],
)
def test_configurations_refused(
    path: Path, model: LlamaModel, changes: dict[str, object], message: str
) -> None:
    edit_config(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(path, model)


def test_tensors_refused(path: Path, model: LlamaModel) -> None:
    def refused(edit: object, message: str) -> None:
        original = (path / "model.safetensors").read_bytes()
        edit_tensors(path, edit)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=message):
            load(path, model)
        (path / "model.safetensors").write_bytes(original)

    slope, qproj = "calibration.slope", "model.layers.0.self_attn.q_proj.weight"
    refused(lambda t: t.pop(slope), "missing tensor calibration.slope")
    refused(lambda t: t.pop(qproj), f"missing tensor {qproj}")
    refused(lambda t: t.update({slope: torch.ones(3)}), r"calibration.slope: expected \[2\]")
    refused(lambda t: t.update({slope: torch.tensor([1.0, float("nan")])}), "NaN or infinite")
    refused(lambda t: t[qproj].fill_(float("inf")), "q_proj.weight: has NaN or infinite")
    refused(lambda t: t.update({"lm_head.weight": torch.ones(97, 64)}), "unknown tensor lm_head")
    refused(lambda t: t.update({"fc.weight": torch.ones(2)}), "unknown tensor fc.weight")
    load(path, model)


def test_a_truncated_file(path: Path, model: LlamaModel) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(path, model)


def test_an_exit_of_another_target(path: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "other", num_hidden_layers=5)
    with pytest.raises(CheckpointError, match="made for another target"):
        load(path, make_model(tmp_path / "other"))


def test_layers_out_of_range(target: Path) -> None:
    config = ModelConfig.from_directory(target)
    for number in (-1, 0, 3, 4):
        with pytest.raises(ValueError, match=rf"exit_layer: expected 1..2 .* got {number}"):
            ExitConfig.for_target(config, number, name="x")


def test_writing_checks_the_tensors(tmp_path: Path, target: Path) -> None:
    config = ExitConfig.for_target(ModelConfig.from_directory(target), 1, name="x")
    with pytest.raises(ValueError, match="expected .* got nothing"):
        write_exit(tmp_path / "out", config, {})
    assert not (tmp_path / "out").exists()


def test_another_kind_is_no_exit(target: Path, tmp_path: Path, model: LlamaModel) -> None:
    make_draft_checkpoint(target, tmp_path / "fspad")
    with pytest.raises(CheckpointError, match="drafter: expected 'eesd', got 'fspad'"):
        read_exit(tmp_path / "fspad", model.config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no config.json"):
        read_exit(tmp_path / "empty", model.config)


def test_control_by_name(path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specrt.loading.load_tokenizer", lambda *_: None)
    engine = specrt.load(target, path, controller="fixed-3", progress=False)
    assert isinstance(engine.drafter, EesdDrafter)
    assert engine.drafter.control.options == ControlOptions(kind="fixed", draft_len=3)
    options = ControlOptions(kind="beta-ts", prior=(2.0, 1.0))
    engine = specrt.load(target, path, controller=options, progress=False)
    assert isinstance(engine.drafter, EesdDrafter)
    assert engine.drafter.control.options == options
    with pytest.raises(ValueError, match=r"controller: expected .*cost-aware, got .sometimes."):
        specrt.load(target, path, controller="sometimes", progress=False)
    with pytest.raises(ValueError, match="controller: only trained drafters"):
        specrt.load(target, None, controller="beta-ts", progress=False)
