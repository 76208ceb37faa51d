"""Heads of sizes that no kernel takes: weights, logits and text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import specrt
from specrt.cache import CacheBatch
from specrt.config import ModelConfig
from specrt.draft.base import DraftParams
from specrt.models.heads import HeadLayout, pad_heads
from specrt.models.loader import LayerWeights, load_weights
from specrt.models.rope import rope_table
from tests.checkpoints import (
    edit_config,
    make_checkpoint,
    make_draft_checkpoint,
    make_exit_checkpoint,
    store_as_float8,
)
from tests.cli.test_cli import write_tokenizer
from tests.families import build, compare
from tests.family_cases import Case
from tests.models.test_llama import FLOAT32_TOLERANCE, PROMPT, error

SIZES = [
    ("llama", 100),
    ("llama_biased", 10),
    ("llama_linear_rope", 24),
    ("mistral", 50),
    ("qwen2", 20),
    ("qwen3", 20),
]
GREEDY = specrt.SamplingParams(max_new_tokens=12, ignore_eos=True)


@pytest.mark.parametrize(("family", "head_dim"), SIZES)
def test_logits_and_text_are_those_of_transformers(
    family: str, head_dim: int, tmp_path: Path
) -> None:
    theirs = make_checkpoint(family, tmp_path, head_dim=head_dim, rms_norm_eps=0.1)
    write_tokenizer(tmp_path)
    ids = PROMPT[:40]
    said = list(ids)
    for _ in range(GREEDY.max_new_tokens):
        with torch.no_grad():
            said.append(int(theirs(torch.tensor([said])).logits[0, -1].argmax()))
    engine = specrt.load(tmp_path)
    assert engine.generate(ids, GREEDY).token_ids == said[len(ids) :]
    with torch.no_grad():
        states = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states
    batch = CacheBatch(engine.cache, [engine.cache.open(64)])
    for start, taps in engine.target.extend(ids, batch, taps=("layer.0", "final")):
        for tap, state in (("layer.0", states[1]), ("final", states[-1])):
            expected = state[0, start : start + taps[tap].shape[1]]
            assert error(taps[tap][0], expected) < FLOAT32_TOLERANCE, tap


def unchanged(path: Path) -> object:
    return path


@pytest.mark.parametrize("change", [unchanged, store_as_float8])
@pytest.mark.parametrize("family", ["llama_biased", "qwen3"])
def test_padding_puts_zeros_in_and_leaves_the_rest(
    family: str, change: Callable[[Path], object], tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path, head_dim=20)
    change(tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    plain = load_weights(tmp_path, config, torch.float32)
    padded = load_weights(tmp_path, config, torch.float32, head_dim=32)
    kept = [*range(10), *range(16, 26)]
    for ours, wide in zip(plain.layers, padded.layers, strict=True):
        for name in (field.name for field in fields(LayerWeights)):
            one, other = getattr(ours, name), getattr(wide, name)
            if one is None:
                assert other is None
                continue
            if name in ("qkv", "qkv_bias", "q_norm", "k_norm"):
                other = other.unflatten(0, (-1, 32))
                assert int(other.count_nonzero()) == int(one.count_nonzero()), name
                other = other[:, kept].flatten(0, 1)
            if name == "o":
                other = other.unflatten(1, (-1, 32))
                assert int(other.count_nonzero()) == int(one.count_nonzero())
                other = other[:, :, kept].flatten(1, 2)
            if name in ("q_norm", "k_norm"):
                one = one * (20 / 32) ** 0.5
            assert torch.equal(one, other), name


LAYOUTS = [
    HeadLayout(16, 16),
    HeadLayout(16, 16, is_interleaved=True),
    HeadLayout(16, 16, rotary_dim=4),
    HeadLayout(20, 32, rotary_dim=8, is_interleaved=True),
    HeadLayout(20, 32, rotary_dim=20),
    HeadLayout(10, 16, is_interleaved=True),
]


def turned_as_stored(layout: HeadLayout, head: torch.Tensor, position: int) -> torch.Tensor:
    """A head ``[d]`` in its stored order, as its family's own code turns it."""
    size = layout.rotary_dim or layout.head_dim
    angles = position * 100.0 ** -(torch.arange(0, size, 2).double() / size)
    turned, rest = head[:size], head[size:]
    first, second = turned.view(-1, 2).T if layout.is_interleaved else turned.view(2, -1)
    cos, sin = angles.cos(), angles.sin()
    halves = torch.stack([first * cos - second * sin, second * cos + first * sin])
    return torch.cat([(halves.T if layout.is_interleaved else halves).flatten(), rest])


def turned_as_run(layout: HeadLayout, heads: torch.Tensor, position: int) -> torch.Tensor:
    """``heads [3, P]``, element i with i + P / 2: those behind the turned ones by angles of 0."""
    sizes = {"padded_head_dim": layout.padded, "rotary_dim": layout.rotary_dim}
    table = rope_table(layout.head_dim, 100.0, 64, **sizes).double()
    (cos, sin), (first, second) = table[position].chunk(2), heads.chunk(2, dim=1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_products_of_turned_heads_stay_what_they_are(layout: HeadLayout) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3 * layout.head_dim, 1, generator=generator).double()
    run, stored = torch.ones(3, layout.padded).double(), torch.ones(3, layout.head_dim).double()
    for name, tensor, position in zip("qk", rows, (3, 61), strict=True):
        key = f"model.layers.0.self_attn.{name}_proj.weight"
        ours = layout.arranged(key, tensor).view(3, -1)
        run = run * turned_as_run(layout, ours, position)
        heads = tensor.view(3, -1)
        stored = stored * torch.stack([turned_as_stored(layout, h, position) for h in heads])
    assert torch.allclose(run.sum(1), stored.sum(1), atol=1e-5)
    assert not torch.allclose(run.sum(1), rows.prod(0).view(3, -1).sum(1), atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_element_has_one_place(layout: HeadLayout) -> None:
    for is_turned in (True, False):
        order = layout.order(is_turned=is_turned)
        assert len(order) == layout.padded
        assert sorted(order[order >= 0].tolist()) == list(range(layout.head_dim))
    half = layout.head_dim // 2  # v and o are padded alone
    assert order[:half].tolist() == list(range(half))


def test_rows_in_blocks_change_places_too() -> None:
    """Their bytes, without a look at them."""
    blocks = torch.arange(1, 33, dtype=torch.uint8)[:, None].repeat(1, 34)
    layout = HeadLayout(16, 32, rotary_dim=8, is_interleaved=True)
    got = layout.arranged("model.layers.0.self_attn.k_proj.weight", blocks)
    first, second, zeros = (0, 2, 4, 6, 8, 9, 10, 11), (1, 3, 5, 7, 12, 13, 14, 15), [0] * 8
    for head in (0, 1):
        places = [*(1 + 16 * head + p for p in first), *zeros]
        places += [*(1 + 16 * head + p for p in second), *zeros]
        assert got[32 * head : 32 * head + 32, 5].tolist() == places


@pytest.mark.parametrize(
    "case",
    [
        # Norms over all heads together, and half of a head turned, neighbours a pair.
        Case("OLMo 2", "olmo2", {"hidden_size": 80}),
        Case("GLM", "glm", {"head_dim": 24}),
    ],
    ids=lambda case: case.label,
)
def test_padded_heads_of_other_families(case: Case, tmp_path: Path) -> None:
    eps = {"rms_norm_eps": 0.1}  # where it is not scaled it shows
    theirs = build(replace(case, changes={**case.changes, **eps}), tmp_path)
    write_tokenizer(tmp_path)
    assert compare(theirs, specrt.load(tmp_path).target)[0].state == "equal"


def test_heads_that_need_no_padding_are_not_copied() -> None:
    weight = torch.ones(64, 8)
    assert pad_heads("model.layers.0.self_attn.q_proj.weight", weight, 16, 16) is weight
    assert pad_heads("model.layers.0.mlp.up_proj.weight", weight, 10, 16) is weight


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd")
    make_checkpoint("llama", path, head_dim=20)
    write_tokenizer(path)
    return path


def small_model(target: Path, path: Path) -> None:
    make_checkpoint("qwen3", path, head_dim=10)


def draft_layer(target: Path, path: Path) -> None:
    make_draft_checkpoint(target, path)


def exit_layer(target: Path, path: Path) -> None:
    make_exit_checkpoint(target, path, 2)


@pytest.mark.parametrize("make", [small_model, draft_layer, exit_layer])
def test_drafters_beside_and_of_such_heads(make: Any, odd: Path, tmp_path: Path) -> None:
    make(odd, tmp_path)
    expected = specrt.load(odd).generate(PROMPT[:40], GREEDY)
    engine = specrt.load(odd, tmp_path)
    result = engine.generate(PROMPT[:40], GREEDY, DraftParams(depth=4))
    assert result.token_ids == expected.token_ids
    assert result.stats.num_draft_tokens > 0
    if make is exit_layer:  # the target's own last layer, so all of it is right
        assert result.stats.num_accepted_tokens > 4


def test_larger_ones_are_refused_at_load(odd: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, head_dim=320)
    write_tokenizer(tmp_path)
    for paths in ((tmp_path,), (odd, tmp_path)):
        with pytest.raises(ValueError, match="head_dim: .* at most 256, the model has 320"):
            specrt.load(*paths)
    edit_config(tmp_path, head_dim=15)
    with pytest.raises(ValueError, match="head_dim: rotary embedding needs an even size"):
        specrt.load(tmp_path)
