"""A GPU's memory, made up: what fits is asked before anything is made, and the cache gets the rest.

The device has no memory that could be read; how much of it is free is what a test says.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specrt.cache import KVCache
from specrt.config import LayerKind, ModelConfig
from specrt.device import Device
from specrt.draft.base import CachingDrafter, Drafter, EmptyDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.engine.engine import Engine
from specrt.engine.limits import EngineLimits
from specrt.engine.memory import MARGIN, PAGE_SIZE, size_check, workspace_bytes
from specrt.models.layouts import weight_bytes
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.ops import linear_workspace
from specrt.sampling import SamplingParams
from tests.checkpoints import make_checkpoint, make_draft_checkpoint, make_exit_checkpoint
from tests.engine.support import LetterTokenizer, make_engine, make_model, prompts, texts

META = torch.device("meta")
GPU = Device(torch.device("cuda", 0))
BF16 = torch.bfloat16

Give = Callable[[int], None]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide")
    make_checkpoint("llama", path, head_dim=64, attention_bias=True, dtype=BF16)
    return path


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Give:
    """Says how many bytes are free, of 24 GiB."""
    return lambda free: monkeypatch.setattr(Device, "free_memory", lambda device: (free, 24 << 30))


def model_there(path: Path) -> LlamaModel:
    config = ModelConfig.from_directory(path)
    there = Device(META)
    return LlamaModel(config, place_weights(load_weights(path, config, BF16), there), there)


def engine_there(model: LlamaModel, drafter: Drafter | None = None, **limits: int) -> Engine:
    return Engine(model, drafter or EmptyDrafter(), LetterTokenizer(), **limits)


def page_bytes(model: LlamaModel) -> int:
    return model.new_cache(PAGE_SIZE).page_bytes


def rest(model: LlamaModel, **limits: int) -> int:
    """Bytes that are no pages'."""
    return workspace_bytes(model.config, BF16, EngineLimits(**limits))


# --- before anything is made ----------------------------------------------------------------------


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_size_of_weights_is_known_from_the_config(tmp_path: Path, is_tied: bool) -> None:
    make_checkpoint("qwen3", tmp_path, tie_word_embeddings=is_tied, attention_bias=True)
    config, told = ModelConfig.from_directory(tmp_path), list[int]()
    weights = load_weights(tmp_path, config, BF16, head_dim=64, check_size=told.append)
    vectors = [
        tensor
        for layer in weights.layers
        for tensor in vars(layer).values()
        if tensor is not None and tensor.dim() == 1
    ]
    num_matrices = 4 * config.num_layers + 2 - is_tied
    size = weights.arena.nbytes + sum(one.nbytes for one in [*vectors, weights.final_norm])
    assert told == [weight_bytes(replace(config, head_dim=64), BF16)]
    assert 0 <= size - told[0] < 64 * num_matrices


def test_a_model_of_8_billion_parameters(wide: Path, give: Give) -> None:
    config = replace(
        ModelConfig.from_directory(wide),
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
        num_heads=32, num_kv_heads=8, head_dim=128, max_positions=8192, has_attention_bias=False,
        is_head_tied=False,
    )  # fmt: skip
    weights = weight_bytes(config, BF16)
    assert weights / 2**30 == pytest.approx(14.96, abs=0.01)
    # 512 rows of logits in float32 and their activations, twice; linear's workspace; the margin.
    logits, row = 512 * 128256 * 4, (3 * 4096 + 6144 + 4096 + 14336) * 2
    rope, linear = (8192 + 128) * 128 * 4, 4 * linear_workspace(6144, 4096, 1 << 20)
    expected = 2 * (logits + 512 * row + rope) + linear + MARGIN
    assert workspace_bytes(config, BF16, EngineLimits()) == expected
    needed = (weights + (1008 << 20) + expected) / 2**30
    give(16 << 30)
    with pytest.raises(MemoryError) as caught:
        size_check(config, BF16, EngineLimits(max_cached_tokens=8000), GPU)(weights)
    assert str(caught.value) == (
        f"no room on cuda:0: needed {needed:.2f} GiB (weights 14.96 GiB + KV cache 1008.0 MiB + "
        f"workspace {expected / 2**30:.2f} GiB), free 16.00 GiB of 24.00 GiB; a smaller "
        "max_cached_tokens needs less, device='cpu' nothing of it"
    )


@pytest.mark.parametrize(
    ("limits", "pages", "smaller"),
    [
        ({}, 2, "max_batch or max_nodes"),
        ({"max_nodes": 65}, 3, "max_batch or max_nodes"),
        ({"max_cached_tokens": 65}, 2, "max_cached_tokens"),
        ({"max_cached_tokens": 6400}, 100, "max_cached_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_to_the_byte(
    wide: Path, give: Give, limits: dict[str, int], pages: int, smaller: str
) -> None:
    model = model_there(wide)
    check = size_check(model.config, BF16, EngineLimits(**limits), GPU)
    needed = 1000 + (pages + 1) * page_bytes(model) + rest(model, **limits)
    give(needed)
    check(1000)
    give(needed - 1)
    with pytest.raises(MemoryError, match=rf"^no room on cuda:0: needed .*; a smaller {smaller} "):
        check(1000)
    size_check(model.config, BF16, EngineLimits(**limits), Device())(1 << 60)


def test_what_is_free_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[str]()

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        assert calls == ["empty_cache"] and device == GPU.place
        return 3, 7

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert GPU.free_memory() == (3, 7)


def test_memory_that_is_known_by_trying() -> None:
    """The CPU's, and a simulated GPU's."""
    assert Device().free_memory() == Device(is_gpu=True).free_memory() == (sys.maxsize, sys.maxsize)


# --- the pool -------------------------------------------------------------------------------------


def test_the_cache_gets_what_is_left(
    wide: Path, give: Give, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_there(wide)
    give(rest(model, max_batch=2) + 9 * page_bytes(model) + 5)
    with caplog.at_level(logging.INFO, logger="specrt"):
        cache = engine_there(model, max_batch=2).cache
    assert cache.kv.is_meta and cache.num_pages == cache.max_pages == 8  # and scratch
    assert "KV cache: room for 512 tokens, " in caplog.text
    assert "free on meta (of 24.00 GiB)" in caplog.text


def test_no_more_than_its_sequences_can_use(wide: Path, give: Give) -> None:
    model = model_there(wide)
    give(8 << 30)
    longest = -(-(model.config.max_positions + 40) // PAGE_SIZE)
    assert engine_there(model, max_batch=3, max_nodes=40).cache.num_pages == 3 * longest


def test_what_was_asked_for_is_what_there_is(wide: Path, give: Give) -> None:
    model = model_there(wide)
    give(8 << 30)
    assert engine_there(model, max_cached_tokens=130).cache.num_pages == 3
    give(rest(model, max_cached_tokens=130) + 4 * page_bytes(model) - 1)
    with pytest.raises(MemoryError, match=r"needed .* \(KV cache .*; a smaller max_cached_tokens"):
        engine_there(model, max_cached_tokens=130)


def windowed(model: LlamaModel, *windows: int | None) -> LlamaModel:
    """Its layers, as many of them as there are windows, see these."""
    layers = tuple(LayerKind(window) for window in windows)
    config = replace(model.config, form=replace(model.config.form, layers=layers))
    return LlamaModel(config, model.weights, model.device)


def test_layers_with_windows_have_what_they_can_use(
    wide: Path, give: Give, caplog: pytest.LogCaptureFixture
) -> None:
    """The others get the rest."""
    model = windowed(model_there(wide), 100, None, 100)
    assert page_bytes(model) % 3 == 0
    limits = {"max_batch": 2, "max_nodes": 20, "prefill_chunk": 65}
    # 100 positions and three trees of 20 lie on 4 pages at most; a chunk's are 2.
    layer = page_bytes(model) // 3
    for num_bytes, sizes in (
        (99 * layer, [18, 10]),  # of 512 positions and a tree, 9 each
        (36 * layer, [13, 10]),  # (13 + 1) + 2 * (10 + 1)
        (36 * layer - 1, [12, 10]),
        (30 * layer, [9, 9]),
        (30 * layer - 1, [8, 8]),
    ):
        give(rest(model, **limits) + num_bytes)
        with caplog.at_level(logging.INFO, logger="specrt"):
            cache = engine_there(model, **limits).cache
        assert [pool.num_pages for pool in cache.pools] == sizes
        assert all(pool.num_pages == pool.max_pages for pool in cache.pools)
        assert f"room for {64 * sizes[0]} and {64 * sizes[1]} tokens" in caplog.messages[-1]
    asked = {**limits, "max_cached_tokens": 6400}
    give(rest(model, **asked) + (101 + 2 * 11) * layer)
    cache = engine_there(model, **asked).cache
    assert [pool.num_pages for pool in cache.pools] == [100, 10]
    size_check(model.config, BF16, EngineLimits(**asked), GPU)(0)
    give(rest(model, **asked) + (101 + 2 * 11) * layer - 1)
    for ask in (
        lambda: engine_there(model, **asked),
        lambda: size_check(model.config, BF16, EngineLimits(**asked), GPU)(0),
    ):
        with pytest.raises(MemoryError, match=r"a smaller max_cached_tokens needs less"):
            ask()


def test_where_all_layers_see_a_window(wide: Path, give: Give) -> None:
    """No text needs more than it sees, however long it becomes."""
    model = windowed(model_there(wide), 100, 200, 100)
    limits = {"max_batch": 2, "max_nodes": 20, "prefill_chunk": 65}
    give(8 << 30)
    cache = engine_there(model, **limits).cache
    assert [pool.num_pages for pool in cache.pools] == [2 * 4 + 2, 2 * 6 + 2]
    cache = engine_there(model, **limits, max_cached_tokens=640_000).cache
    assert [pool.num_pages for pool in cache.pools] == [2 * 4 + 2, 2 * 6 + 2]


def test_a_drafters_pages_are_counted_too(wide: Path, give: Give) -> None:
    model, drafter = model_there(wide), SmallModelDrafter(model_there(wide))
    give(rest(model, max_batch=2) + 9 * page_bytes(model) + 5)
    assert engine_there(model, drafter, max_batch=2).cache.num_pages == 3
    assert drafter.cache.num_pages == drafter.cache.max_pages == 3


def test_trained_drafters_tell_where_they_cache(checkpoint: Path, tmp_path: Path) -> None:
    make_draft_checkpoint(checkpoint, tmp_path / "fspad")
    make_exit_checkpoint(checkpoint, tmp_path / "exit", 1)
    for name in ("fspad", "exit"):
        drafter = load_drafter(tmp_path / name, make_model(checkpoint), None, DrafterOptions())
        assert isinstance(drafter, CachingDrafter) and drafter.cache.page_size == PAGE_SIZE
    assert not isinstance(EmptyDrafter(), CachingDrafter)


@pytest.mark.parametrize("cache", [None, {}, SimpleNamespace(device=Device(META))], ids=str)
def test_what_a_drafter_keeps_elsewhere_is_not(wide: Path, give: Give, cache: object) -> None:
    class Keeping(EmptyDrafter):
        pass

    drafter, model = Keeping(), model_there(wide)
    drafter.cache = cache  # type: ignore[attr-defined]
    give(8 << 30)
    assert engine_there(model, drafter, max_cached_tokens=64).cache.num_pages == 1


def test_texts_in_a_fixed_cache(checkpoint: Path) -> None:
    """Who does not fit beside the others waits, and says the same."""
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    model, asked = make_model(checkpoint), prompts(5, 97)
    expected = texts(make_engine(model).generate(asked, params))
    engine = make_engine(model)
    engine.cache.fix(5)
    place = engine.cache.kv.data_ptr()
    assert texts(engine.generate(asked, params)) == expected
    assert engine.cache.kv.data_ptr() == place and engine.cache.num_pages == 5
    with pytest.raises(MemoryError, match="max_pages is 5"):
        engine.cache.open(6 * PAGE_SIZE)


def test_fixing_a_cache_that_is_larger_takes_nothing_away(checkpoint: Path) -> None:
    cache: KVCache = make_model(checkpoint).new_cache()
    sequence = cache.open(100)
    num_pages, kv = cache.num_pages, cache.kv
    cache.fix(1)
    assert cache.num_pages == cache.max_pages == num_pages and cache.kv is kv
    assert len(sequence.pages) == 2
