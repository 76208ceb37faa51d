"""Official layouts as others have repackaged them, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import specrt
from specrt.config import ModelConfig
from specrt.draft.base import DraftParams
from specrt.draft.fspad.checkpoint import read_checkpoint, write_checkpoint
from specrt.draft.fspad.official import HEAD, other_kind
from specrt.models.checkpoint import TensorInfo
from specrt.models.layouts import is_rounded_copy
from specrt.types import CheckpointError
from tests.checkpoints import edit_config, edit_tensors, make_checkpoint, make_official_draft
from tests.cli.test_cli import write_tokenizer

PROMPT = list(range(5, 40))
GREEDY = specrt.SamplingParams(max_new_tokens=24, ignore_eos=True)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("targets") / "little"
    make_checkpoint("qwen2", path, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def head(target: Path) -> torch.Tensor:
    return load_file(target / "model.safetensors")[HEAD]


@pytest.fixture(scope="module")
def plain(target: Path) -> list[int]:
    return specrt.load(target).generate(PROMPT, GREEDY).token_ids


def assert_drafts(target: Path, drafter: Path, plain: list[int]) -> None:
    engine = specrt.load(target, drafter)
    result = engine.generate(PROMPT, GREEDY, DraftParams(depth=3, total_tokens=12))
    assert result.token_ids == plain and result.stats.num_draft_tokens > 0


def add_biases(tensors: Tensors) -> None:
    for name, size in (("q", 64), ("k", 32), ("v", 32)):
        tensors[f"layers.0.self_attn.{name}_proj.bias"] = torch.linspace(-1, 1, size).half()


def add_prefix(tensors: Tensors) -> None:
    for key in list(tensors):
        tensors[f"model.{key}"] = tensors.pop(key)


@pytest.mark.parametrize("changes", [(add_biases,), (add_prefix,), (add_biases, add_prefix)])
@pytest.mark.parametrize("arch", ["fspad", "eagle2"])
def test_biases_and_prefixes(
    arch: str,
    changes: tuple[Callable[[Tensors], None], ...],
    target: Path,
    plain: list[int],
    tmp_path: Path,
) -> None:
    stored = make_official_draft(tmp_path / "src", target, arch)
    if add_biases in changes:
        add_biases(stored)
    for change in changes:
        edit_tensors(tmp_path / "src", change)
    model = ModelConfig.from_directory(target)
    config, tensors = read_checkpoint(tmp_path / "src", model)
    assert config.layer.has_attention_bias == (add_biases in changes)
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[key], stored[key]) for key in stored)
    assert_drafts(target, tmp_path / "src", plain)
    write_checkpoint(tmp_path / "ours", config, tensors)
    again, same = read_checkpoint(tmp_path / "ours", model)
    assert again.layer.has_attention_bias == config.layer.has_attention_bias
    assert same.keys() == tensors.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_prefixed", [False, True])
def test_a_copy_of_the_head(
    dtype: torch.dtype,
    is_prefixed: bool,
    target: Path,
    head: torch.Tensor,
    plain: list[int],
    tmp_path: Path,
) -> None:
    tensors = make_official_draft(tmp_path / "src", target, "eagle2")
    if is_prefixed:
        add_prefix(tensors)
    save_file(tensors | {HEAD: head.to(dtype)}, tmp_path / "src" / "model.safetensors")
    assert_drafts(target, tmp_path / "src", plain)


def test_a_head_of_its_own_is_refused(target: Path, head: torch.Tensor, tmp_path: Path) -> None:
    tensors = make_official_draft(tmp_path / "src", target, "eagle2")
    other = head.half()
    other[96, 63] += 0.01
    save_file(tensors | {HEAD: other}, tmp_path / "src" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"src: lm_head.weight: differs from the target's"):
        specrt.load(target, tmp_path / "src")


def test_tables_that_are_the_same_up_to_rounding() -> None:
    exact = torch.linspace(-3, 3, 5000 * 2).view(5000, 2)
    narrow, half = exact.bfloat16(), exact.half()
    for one, other in [(exact, narrow), (narrow, exact), (narrow, narrow.half()), (half, exact)]:
        assert is_rounded_copy(one, other)
    assert not is_rounded_copy(half, narrow)  # rounded otherwise, neither from the other
    narrow[4999, 1] = 2.5
    assert not is_rounded_copy(exact, narrow)
    assert not is_rounded_copy(exact, exact[:4999])


KINDS = {
    "EAGLE-3": ["midlayer.self_attn.q_proj.weight", "d2t", "t2d", "layers.0.hidden_norm.weight"],
    "Medusa": ["medusa_head.0.0.linear.weight", "0.0.linear.weight", "blocks.0.layers.0.weight"],
    "MLP speculator": ["speculator.emb.0.weight", "head.2.weight"],
    "MTP": ["mtp.fc.weight", "layers.61.enorm.weight", "eh_proj.weight"],
}


@pytest.mark.parametrize(("kind", "key"), [(k, key) for k in KINDS for key in KINDS[k]])
def test_kinds_are_told_by_a_key(kind: str, key: str) -> None:
    info = TensorInfo(Path("x"), "x", (4, 8), torch.float32)
    assert other_kind({"fc.weight": info, key: info}) == kind


def test_models_and_eagle_are_no_other_kind(target: Path, tmp_path: Path) -> None:
    info = TensorInfo(Path("x"), "x", (4, 8), torch.float32)
    eagle = make_official_draft(tmp_path / "src", target, "eagle2")
    for keys in (load_file(target / "model.safetensors"), eagle):
        assert other_kind(dict.fromkeys(keys, info)) is None


def test_another_kind_is_named_before_its_configuration_is_read(
    target: Path, tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path)
    edit_config(tmp_path, model_type="medusa")
    edit_tensors(tmp_path, lambda t: t.update({"medusa_head.0.0.linear.weight": torch.ones(4, 4)}))
    with pytest.raises(CheckpointError, match="Medusa drafters are not supported yet"):
        specrt.load(target, tmp_path)
