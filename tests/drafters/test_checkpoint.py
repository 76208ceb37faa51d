"""Checkpoints of one-layer drafters: every layout that loads, and writing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import specrt
from specrt.config import ModelConfig, config_fingerprint
from specrt.draft import files
from specrt.draft.base import DraftParams
from specrt.draft.fspad.checkpoint import (
    ARCHS,
    EMBED,
    FORMAT_VERSION,
    TOKEN_IDS,
    DraftConfig,
    is_draft_checkpoint,
    read_checkpoint,
    reduce_vocabulary,
    write_checkpoint,
)
from specrt.sampling import SamplingParams
from specrt.types import CheckpointError
from tests.checkpoints import (
    edit_config,
    make_checkpoint,
    make_draft_checkpoint,
    make_official_draft,
    random_draft_tensors,
)
from tests.cli.test_cli import write_tokenizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROMPT = list(range(5, 40))
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("targets") / "little"
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model(target: Path) -> ModelConfig:
    return ModelConfig.from_directory(target)


@pytest.fixture(scope="module")
def plain(target: Path) -> list[int]:
    """What the target says without a drafter."""
    return specrt.load(target).generate(PROMPT, GREEDY).token_ids


def assert_same(read: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert read.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor), key


def drafts(target: Path, drafter: Path) -> tuple[list[int], int]:
    """The text with a drafter, and how many tokens that proposed."""
    engine = specrt.load(target, drafter)
    result = engine.generate(PROMPT, GREEDY, DraftParams(depth=3, total_tokens=12))
    return result.token_ids, result.stats.num_draft_tokens


# --- official layouts -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_bin", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_official_layouts(
    tmp_path: Path, target: Path, model: ModelConfig, arch: str, dtype: torch.dtype, is_bin: bool
) -> None:
    tensors = make_official_draft(tmp_path / "src", target, arch, dtype, is_bin=is_bin)
    assert is_draft_checkpoint(tmp_path / "src")
    for wanted in (model, None):
        config, read = read_checkpoint(tmp_path / "src", wanted)
        assert_same(read, tensors)
        assert config.arch == arch
        assert (config.target_name, config.target_fingerprint) == (None, None)
        assert config.draft_vocab_size is None
        assert config.extra["authors_note"] == {"by": "them"}
    assert (config.layer.num_layers, config.layer.intermediate_size) == (1, 112)
    assert (config.layer.num_heads, config.layer.num_kv_heads, config.layer.head_dim) == (4, 2, 16)


@pytest.mark.parametrize("arch", ARCHS)
def test_official_drafters_are_loaded_and_draft(
    tmp_path: Path, target: Path, plain: list[int], arch: str
) -> None:
    make_official_draft(tmp_path / "src", target, arch, is_bin=arch == "eagle2")
    text, num_drafted = drafts(target, tmp_path / "src")
    assert text == plain
    assert num_drafted > 0


def test_tensors_that_may_be_there_or_not(tmp_path: Path, target: Path, plain: list[int]) -> None:
    tensors = make_official_draft(tmp_path / "src", target, "eagle2")
    embedding = torch.randn(97, 64).half()
    more = {"layers.0.self_attn.rotary_emb.inv_freq": torch.arange(8) / 8, EMBED: embedding}
    del tensors["fc.bias"]
    save_file(tensors | more, tmp_path / "src" / "model.safetensors")
    _, read = read_checkpoint(tmp_path / "src")
    assert_same(read, {**tensors, EMBED: embedding})
    assert drafts(target, tmp_path / "src")[0] == plain


def test_what_official_configurations_leave_out(tmp_path: Path, target: Path) -> None:
    make_official_draft(tmp_path / "src", target, "fspad")
    gone = ("max_position_embeddings", "model_type", "head_dim", "rms_norm_eps")
    edit_config(tmp_path / "src", **dict.fromkeys(gone, ...))
    config, _ = read_checkpoint(tmp_path / "src")
    assert (config.layer.max_positions, config.layer.head_dim) == (2048, 16)


# --- our own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_round_trip(tmp_path: Path, model: ModelConfig, arch: str, dtype: torch.dtype) -> None:
    config = DraftConfig.for_target(model, arch, name="little", intermediate_size=48)
    training = {"steps": 3, "rates": [0.5, 0.25]}
    config = replace(config, layer=replace(config.layer, dtype=dtype), extra={"training": training})
    tensors = random_draft_tensors(config, dtype)
    write_checkpoint(tmp_path / "new" / "one", config, tensors)
    assert is_draft_checkpoint(tmp_path / "new" / "one")
    read, stored = read_checkpoint(tmp_path / "new" / "one", model)
    assert_same(stored, tensors)
    assert replace(read, layer=config.layer) == config
    assert read.layer.intermediate_size == 48 and read.layer.dtype == dtype
    said = json.loads((tmp_path / "new" / "one" / "config.json").read_text())
    assert said["drafter"] == ("eagle" if arch == "eagle2" else "fspad")
    assert said["format_version"] == FORMAT_VERSION
    assert said["target"] == {"name": "little", "fingerprint": config_fingerprint(model)}
    assert said["training"] == training


@pytest.mark.parametrize("family", ["llama3", "llama_linear_rope", "mistral", "qwen2", "qwen3"])
def test_every_familys_layer_survives(tmp_path: Path, family: str) -> None:
    make_checkpoint(family, tmp_path / "target")
    target = ModelConfig.from_directory(tmp_path / "target")
    config = DraftConfig.for_target(target, "fspad", name="it")
    write_checkpoint(tmp_path / "own", config, random_draft_tensors(config, torch.bfloat16))
    read, _ = read_checkpoint(tmp_path / "own", target)
    ids = {"bos_id": target.bos_id, "eos_ids": target.eos_ids}  # a drafter's mean nothing
    assert replace(read.layer, **ids) == config.layer


def test_unknown_keys_survive_and_stale_ones_do_not(tmp_path: Path, target: Path) -> None:
    make_official_draft(tmp_path / "src", target, "fspad")
    edit_config(
        tmp_path / "src", rope_parameters=..., rope_theta=5e5, torch_dtype="float16", dtype=...
    )
    config, tensors = read_checkpoint(tmp_path / "src")
    write_checkpoint(tmp_path / "own", config, tensors)
    again, _ = read_checkpoint(tmp_path / "own")
    assert again.extra == config.extra and again.extra["authors_note"] == {"by": "them"}
    assert again.layer.rope_theta == 5e5 and again.layer.dtype == torch.float16
    said = json.loads((tmp_path / "own" / "config.json").read_text())
    assert not {"rope_theta", "torch_dtype", "architectures"} & said.keys()


def test_parts_of_one_tensor_are_stored(tmp_path: Path, model: ModelConfig) -> None:
    """Two views of one memory, as packed weights are."""
    config = DraftConfig.for_target(model, "eagle2", name="little")
    tensors = random_draft_tensors(config, torch.float32)
    both = torch.randn(2 * 112, 64)
    for name, part in zip(("gate", "up"), both.chunk(2), strict=True):
        tensors[f"layers.0.mlp.{name}_proj.weight"] = part
    write_checkpoint(tmp_path, config, tensors)
    assert_same(read_checkpoint(tmp_path)[1], tensors)


def test_what_cannot_be_written_is_refused(tmp_path: Path, model: ModelConfig) -> None:
    config = DraftConfig.for_target(model, "fspad", name="little")
    tensors = random_draft_tensors(config, torch.float32)
    small, reduced = reduce_vocabulary(config, tensors, torch.arange(97), 5)
    cases: list[tuple[DraftConfig, dict[str, torch.Tensor], str]] = [
        (config, {}, r"'fc.fc.weight'\]: expected \[64, 128\], got nothing"),
        (config, tensors | {"fc.fc.bias": torch.ones(3)}, r"expected \[64\], got \[3\]"),
        (small, tensors, r"'draft_token_ids'\]: expected \[5\], got nothing"),
        (replace(small, draft_vocab_size=6), reduced, r"expected \[6\], got \[5\]"),
    ]
    for made, given, message in cases:
        with pytest.raises(ValueError, match=message):
            write_checkpoint(tmp_path / "dst", made, given)
    assert not (tmp_path / "dst").exists()
    with pytest.raises(ValueError, match="arch: expected one of fspad, .*got 'eagle9'"):
        DraftConfig.for_target(model, "eagle9", name="little")


def half_a_file(_: object, path: Path, **__: object) -> None:
    path.write_bytes(b"half")
    raise SafetensorError("no space left on device")


def failing_text(self: Path, text: str, **_: object) -> int:
    self.write_bytes(text[:5].encode())
    raise OSError(28, "No space left on device", str(self))


@pytest.mark.parametrize(
    ("owner", "name", "stand_in", "message"),
    [
        (files, "save_file", half_a_file, "model.safetensors: cannot be written: no space"),
        (Path, "write_text", failing_text, "No space left on device"),
    ],
    ids=["weights", "config"],
)
def test_a_failure_midway_leaves_the_old_checkpoint_whole(
    tmp_path: Path,
    model: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    stand_in: Callable[..., object],
    message: str,
) -> None:
    config = DraftConfig.for_target(model, "fspad", name="little")
    write_checkpoint(tmp_path / "old", config, random_draft_tensors(config, torch.float32))
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}
    other = DraftConfig.for_target(model, "eagle2", name="little")
    monkeypatch.setattr(owner, name, stand_in)
    for place in ("old", "new"):
        with pytest.raises(OSError, match=message):
            write_checkpoint(tmp_path / place, other, random_draft_tensors(other, torch.float16))
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
    assert list((tmp_path / "new").iterdir()) == []


# --- what kind of directory -----------------------------------------------------------------------


def test_a_small_model_is_no_such_drafter(tmp_path: Path, target: Path, plain: list[int]) -> None:
    assert not is_draft_checkpoint(target)
    make_checkpoint("qwen3", tmp_path / "small")
    assert not is_draft_checkpoint(tmp_path / "small")
    text, num_drafted = drafts(target, tmp_path / "small")
    assert text == plain and num_drafted > 0


def test_a_directory_of_nothing_is_neither(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        is_draft_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: expected a JSON object, got list"):
        is_draft_checkpoint(tmp_path)


def test_token_ids_lie_beside_the_weights(tmp_path: Path, target: Path) -> None:
    make_draft_checkpoint(target, tmp_path)
    config, tensors = read_checkpoint(tmp_path)
    counts = torch.zeros(97, dtype=torch.int64)
    counts[[90, 7, 30]] = torch.tensor([1, 3, 2])
    write_checkpoint(tmp_path, *reduce_vocabulary(config, tensors, counts, 3))
    stored = load_file(tmp_path / "model.safetensors")[TOKEN_IDS]
    assert stored.dtype == torch.int32 and stored.tolist() == [7, 30, 90]
    assert read_checkpoint(tmp_path)[0].draft_vocab_size == 3
