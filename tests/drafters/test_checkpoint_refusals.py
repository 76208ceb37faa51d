"""Drafters that are refused: broken, of another kind, or made for another target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import specrt
from specrt.config import ModelConfig
from specrt.draft.fspad.checkpoint import read_checkpoint
from specrt.types import CheckpointError
from tests.checkpoints import (
    edit_config,
    edit_tensors,
    make_checkpoint,
    make_draft_checkpoint,
    make_official_draft,
)
from tests.cli.test_cli import expect_one_line, run, write_tokenizer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("targets") / "little"
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model(target: Path) -> ModelConfig:
    return ModelConfig.from_directory(target)


Breaking = Callable[[Path], object]


def tensors_with(**changes: Any) -> Breaking:
    """Replaces tensors (dots written as two underscores), or removes those given as None."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in changes.items():
            key = name.replace("__", ".")
            tensors.pop(key, None)
            if value is not None:
                tensors[key] = value

    return lambda path: edit_tensors(path, change)


def config_with(**changes: Any) -> Breaking:
    return lambda path: edit_config(path, **changes)


def ids_of(*ids: int, dtype: torch.dtype = torch.int32, size: int | None = None) -> Breaking:
    def change(path: Path) -> None:
        edit_config(path, draft_vocab_size=len(ids) if size is None else size)
        tensors_with(draft_token_ids=torch.tensor(ids, dtype=dtype))(path)

    return change


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def with_nan(value: float) -> Breaking:
    weight = torch.zeros(112, 64)
    weight[111, 63] = value
    return tensors_with(layers__0__mlp__up_proj__weight=weight)


OURS: dict[str, tuple[Breaking, str]] = {
    "missing": (
        tensors_with(layers__0__self_attn__o_proj__weight=None),
        "DIR: missing tensor layers.0.self_attn.o_proj.weight [64, 64]",
    ),
    "unknown": (
        tensors_with(exit_head__weight=torch.zeros(97, 64)),
        "model.safetensors: unknown tensor exit_head.weight [97, 64]",
    ),
    "head": (
        tensors_with(lm_head__weight=torch.zeros(96, 64)),
        "model.safetensors: lm_head.weight: expected [97, 64], got [96, 64]",
    ),
    "one bias of three": (
        tensors_with(layers__0__self_attn__k_proj__bias=torch.zeros(32)),
        "DIR: missing tensor layers.0.self_attn.q_proj.bias [64]",
    ),
    "prefixed twice": (
        tensors_with(model__fc__fc__bias=torch.zeros(64)),
        "model.safetensors: fc.fc.bias is there twice, once under model.",
    ),
    "misshaped": (
        tensors_with(fc__fc__weight=torch.zeros(64, 64)),
        "model.safetensors: fc.fc.weight: expected [64, 128], got [64, 64]",
    ),
    "not split": (
        tensors_with(layers__0__mlp__down_proj__weight=torch.zeros(64, 112)),
        "layers.0.mlp.down_proj.weight: expected [128, 112], got [64, 112]",
    ),
    "embedding": (
        tensors_with(embed_tokens__weight=torch.zeros(96, 64)),
        "embed_tokens.weight: expected [97, 64], got [96, 64]",
    ),
    "integers": (
        tensors_with(fc__fc__bias=torch.zeros(64, dtype=torch.int32)),
        "fc.fc.bias: expected a floating-point tensor, got torch.int32",
    ),
    "hidden": (
        config_with(hidden_size=32, head_dim=16),
        "config.json: hidden_size: the target has 64, this drafter 32",
    ),
    "vocabulary": (
        config_with(vocab_size=98),
        "config.json: vocab_size: the target has 97, this drafter 98",
    ),
    "fingerprint": (
        config_with(target={"name": "big", "fingerprint": "0" * 16}),
        f"config.json: made for another target (big, fingerprint {'0' * 16}; this one has ",
    ),
    "target": (config_with(target="big"), "config.json: target: expected an object, got 'big'"),
    "kind": (config_with(drafter="medusa"), "this version has no drafter of kind 'medusa'"),
    "no kind": (config_with(drafter=None), "this version has no drafter of kind None"),
    "newer": (config_with(format_version=2), "format_version: this version reads 1, got 2"),
    "no version": (config_with(format_version=...), "this version reads 1, got None"),
    "flag": (
        config_with(has_split_output="yes"),
        "has_feature_sampling, has_split_output: expected true or false, got (True, 'yes')",
    ),
    "no flag": (config_with(has_feature_sampling=...), "expected true or false, got (None, True)"),
    "NaN": (with_nan(float("nan")), "layers.0.mlp.up_proj.weight: has NaN or infinite values"),
    "infinite": (with_nan(float("-inf")), "up_proj.weight: has NaN or infinite values"),
    "truncated": (truncate, "model.safetensors: truncated or corrupt"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "DIR: no weights"),
    "no JSON": (
        lambda path: (path / "config.json").write_text("{"),
        "config.json: cannot be read as JSON",
    ),
    "unsorted": (ids_of(3, 5, 4), "draft_token_ids: expected increasing token ids in 0..96"),
    "repeated": (ids_of(3, 3, 4), "draft_token_ids: expected increasing token ids in 0..96"),
    "negative": (ids_of(-1, 3, 4), "draft_token_ids: expected increasing token ids in 0..96"),
    "beyond": (ids_of(3, 5, 97), "draft_token_ids: expected increasing token ids in 0..96"),
    "int64": (ids_of(3, 5, dtype=torch.int64), "draft_token_ids: expected int32, got torch.int64"),
    "too few": (ids_of(3, 5, size=3), "draft_token_ids: expected [3], got [2]"),
    "no size": (
        tensors_with(draft_token_ids=torch.arange(3, dtype=torch.int32)),
        "unknown tensor draft_token_ids [3]",
    ),
    "no ids": (config_with(draft_vocab_size=3), "missing tensor draft_token_ids [3]"),
    "size 0": (config_with(draft_vocab_size=0), "draft_vocab_size: expected null or 1..97, got 0"),
    "size 98": (config_with(draft_vocab_size=98), "expected null or 1..97, got 98"),
    "size text": (config_with(draft_vocab_size="9"), "expected null or 1..97, got '9'"),
}
OFFICIAL: dict[str, tuple[Breaking, str]] = {
    "EAGLE-3": (tensors_with(d2t=torch.arange(5)), "DIR: EAGLE-3 drafters are not supported yet"),
    "midlayer": (
        tensors_with(midlayer__self_attn__q_proj__weight=torch.zeros(64, 128)),
        "DIR: EAGLE-3 drafters are not supported yet",
    ),
    "three features": (
        tensors_with(fc__weight=torch.zeros(64, 192)),
        "DIR: EAGLE-3 drafters are not supported yet",
    ),
    "MTP": (tensors_with(enorm__weight=torch.ones(64)), "DIR: MTP drafters are not supported yet"),
    "two layers": (
        tensors_with(layers__1__self_attn__q_proj__weight=torch.zeros(64, 64)),
        "DIR: a drafter of several layers (layers.1.self_attn.q_proj.weight), expected one",
    ),
    "first norm": (
        tensors_with(layers__0__input_layernorm__weight=torch.ones(64)),
        "DIR: a drafter with norms that FSPAD and EAGLE-1/2 do not have "
        "(layers.0.input_layernorm.weight)",
    ),
    "last norm": (
        tensors_with(model__norm__weight=torch.ones(64)),
        "DIR: a drafter with norms that FSPAD and EAGLE-1/2 do not have (norm.weight)",
    ),
    "q norm": (
        tensors_with(layers__0__self_attn__q_norm__weight=torch.ones(16)),
        "DIR: a drafter with norms that FSPAD and EAGLE-1/2 do not have "
        "(layers.0.self_attn.q_norm.weight)",
    ),
    "no fc": (tensors_with(fc__fc__weight=None), "DIR: no FSPAD or EAGLE drafter"),
    "no layer": (
        tensors_with(layers__0__mlp__down_proj__weight=None),
        "DIR: no FSPAD or EAGLE drafter",
    ),
    "size": (config_with(hidden_size=...), "config.json: missing key hidden_size"),
    "NaN": (with_nan(float("nan")), "layers.0.mlp.up_proj.weight: has NaN or infinite values"),
    "no config": (lambda path: (path / "config.json").unlink(), "DIR: no config.json"),
}
CASES = [(True, name) for name in OURS] + [(False, name) for name in OFFICIAL]


def break_one(folder: Path, target: Path, is_ours: bool, name: str) -> tuple[Path, str]:
    """A broken drafter's directory, and what must be said of it."""
    path = folder / "drafter"
    if is_ours:
        make_draft_checkpoint(target, path)
    else:
        make_official_draft(path, target, "fspad")
    change, message = (OURS if is_ours else OFFICIAL)[name]
    change(path)
    return path, message.replace("DIR", str(path))


@pytest.mark.parametrize(("is_ours", "name"), CASES)
def test_refusals_name_the_file_and_what_was_expected(
    tmp_path: Path, target: Path, model: ModelConfig, is_ours: bool, name: str
) -> None:
    path, message = break_one(tmp_path, target, is_ours, name)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path, model)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("is_ours", "name"), [case for case in CASES if case != (False, "no fc")])
def test_a_user_sees_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path, is_ours: bool, name: str
) -> None:
    path, message = break_one(tmp_path, target, is_ours, name)
    args = ("--target", str(target), "--drafter", str(path), "--prompt", "hi")
    expect_one_line(run(capsys, "generate", *args), message)


def test_a_drafter_of_another_target_of_the_same_sizes(tmp_path: Path, target: Path) -> None:
    make_checkpoint("llama", tmp_path / "other", num_hidden_layers=2)
    make_draft_checkpoint(tmp_path / "other", tmp_path / "drafter")
    with pytest.raises(CheckpointError, match=r"made for another target \(tiny, fingerprint"):
        specrt.load(target, tmp_path / "drafter")
    assert read_checkpoint(tmp_path / "drafter")[0].target_name == "tiny"
