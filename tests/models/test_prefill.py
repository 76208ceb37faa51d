"""Prompts in pieces of several chains: what one pass of 16 rows after another gives, to the bit."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from specrt.cache import CacheBatch
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.models.prefill import GPU_PIECE, Prompts, cuts
from specrt.models.step import FINAL_TAP, layer_tap
from specrt.tree import MAX_NODES, TreeBuilder
from tests.checkpoints import make_checkpoint
from tests.ops.conftest import Backend, load_simt
from tests.simulated_gpu import only_simulated
from tests.trees import trees_of

VOCAB = 97
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
TEXT = [(11 * i * i + 3 * i) % VOCAB for i in range(149)]  # two chains of 80 rows on a GPU
TAPS = (FINAL_TAP, layer_tap(0))


class Way(NamedTuple):
    """How a text is run."""

    most: int | None
    """Rows of a piece; None: as on such a device."""
    chain: int = MAX_NODES
    page_size: int = 64
    calls: Sequence[int] = ()
    """Where the text is cut into calls."""
    taps: tuple[str, ...] = TAPS


ONE_BY_ONE = Way(16, 16)  # no piece has a second chain
WAYS = [
    Way(None),
    Way(64, 16, page_size=16, calls=[23, 90]),  # chains begin within pages
    Way(96, 32, page_size=32, calls=[1, 101]),
    Way(128, 64, taps=TAPS[:1]),
]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(request.param, path, **SIZES)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", path, **SIZES)
    return path


def make_model(path: Path, device: Device, dtype: torch.dtype) -> LlamaModel:
    config = ModelConfig.from_directory(path)
    weights = place_weights(load_weights(path, config, dtype), device)
    return LlamaModel(config, weights, device)


class Outcome(NamedTuple):
    """What a text leaves."""

    starts: list[int]
    taps: dict[str, torch.Tensor]
    """``[n, H]``"""
    cached: torch.Tensor
    """Keys and values, ``[L, 2, n, Hkv * d]``."""
    logits: torch.Tensor
    """Of a tree behind it."""


def run(model: LlamaModel, way: Way, text: Sequence[int] = TEXT) -> Outcome:
    model.prompts = Prompts(model.device, way.most, way.chain)
    cache = model.new_cache(way.page_size)
    other, sequence = cache.open(40), cache.open()
    batch, starts = CacheBatch(cache, [sequence]), list[int]()
    parts: dict[str, list[torch.Tensor]] = {tap: [] for tap in way.taps}
    for begin, end in pairwise([0, *way.calls, len(text)]):
        cache.reserve(sequence, end)
        cache.reserve(other, end)  # so that pages of both lie among each other
        for start, taps in model.extend(text[begin:end], batch.update([sequence]), way.taps):
            starts.append(begin + start)
            for name, tap in taps.items():
                assert tap.shape[0] == 1 and tap.shape[1] <= way.chain
                parts[name].append(tap[0].clone())
    cache.reserve(sequence, len(text) + 3)
    tree = TreeBuilder(5)
    tree.add_path([7, 11], 3)
    logits = model.forward(trees_of([tree]), batch.update([sequence])).logits.clone()
    cached = cache.kv[:, :, sequence.pages].flatten(2, 3)[:, :, : len(text)].flatten(3)
    states = {name: torch.cat(some) for name, some in parts.items()}
    return Outcome(starts, states, cached, logits)


def assert_same(got: Outcome, expected: Outcome) -> None:
    assert torch.equal(got.cached, expected.cached)
    for name, tap in got.taps.items():
        assert torch.equal(tap, expected.taps[name]), name
    assert torch.equal(got.logits, expected.logits)


# --- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_those_of_one_chain_after_another(checkpoint: Path, dtype: torch.dtype) -> None:
    model = make_model(checkpoint, Device(), dtype)
    expected = run(model, ONE_BY_ONE)
    assert expected.starts == list(range(0, len(TEXT), 16))
    for way in [*WAYS, Way(256)]:
        assert_same(run(model, way), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_on_a_gpu(llama: Path, backend: Backend, dtype: torch.dtype) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("the CPU's has a test of its own")
    place = Device(backend.device, is_gpu=True, is_eager=True)
    model = make_model(llama, place, dtype)
    expected = run(model, ONE_BY_ONE)
    for way in WAYS[: 2 if backend.name == "simt" else None]:
        assert_same(run(model, way), expected)


@pytest.mark.slow
@pytest.mark.tensor_cores("sm_80", "sm_90")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_on_a_gpu_in_all_ways(checkpoint: Path, backend: Backend, dtype: torch.dtype) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("the CPU's has a test of its own")
    model = make_model(checkpoint, Device(backend.device, is_gpu=True, is_eager=True), dtype)
    expected = run(model, ONE_BY_ONE)
    for way in [*WAYS, *(Way(None, calls=[cut]) for cut in (1, 63, 64, 65, 128, 129))]:
        assert_same(run(model, way), expected)


def test_rows_that_do_not_count_leave_nothing(llama: Path) -> None:
    """Behind a piece lie the pages as they were."""
    model = make_model(llama, Device(), torch.float32)
    model.prompts = Prompts(model.device, 64, 32)
    cache = model.new_cache(16)
    sequence = cache.open(64)
    cache.kv.fill_(3.0)
    for _ in model.extend(TEXT[:49], CacheBatch(cache, [sequence])):
        pass
    rows = cache.kv[:, :, sequence.pages].flatten(2, 3)
    assert not (rows[:, :, :49] == 3.0).all(-1).all(-1).any() and (rows[:, :, 49:] == 3.0).all()
    assert sequence.length == 49


# --- on a GPU -------------------------------------------------------------------------------------


def prefilled(model: LlamaModel, num_tokens: int, taps: tuple[str, ...] = ()) -> CacheBatch:
    cache = model.new_cache(max_pages=4)
    batch = CacheBatch(cache, [cache.open(num_tokens)])
    for _ in model.extend(TEXT[:num_tokens], batch, taps):
        pass
    return batch


def test_nobody_waits(llama: Path, gpu: Device) -> None:
    model = make_model(llama, gpu, torch.bfloat16)
    before = gpu.num_reads
    model.prompts = Prompts(gpu, 64, 32)
    batch = prefilled(model, 149, TAPS)
    assert gpu.num_reads == before
    assert batch.sequences[0].length == int(gpu.read(batch.kv_len)[0]) == 149


def test_nothing_is_made_that_nobody_reads(
    llama: Path, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No logits; the last layer's rows leave keys and values alone, unless they are tapped."""
    model, heads, layers = make_model(llama, gpu, torch.bfloat16), list[bool](), list[int]()
    head, layer = model.launch_head, model.launch_layer

    def launch_head(hidden: Any, feature: Any, logits: Any, maxima: Any) -> None:
        heads.append(logits is not None)
        head(hidden, feature, logits)

    def launch_layer(index: int, *rest: Any) -> None:
        layers.append(index)
        layer(index, *rest)

    monkeypatch.setattr(model, "launch_head", launch_head)
    monkeypatch.setattr(model, "launch_layer", launch_layer)
    for taps, expected in (
        ((), ([], [0])),
        (("layer.0", "logits"), ([], [0])),
        (("layer.1",), ([], [0, 1])),
        (("final",), ([False], [0, 1])),
    ):
        heads.clear()
        layers.clear()
        prefilled(model, 20, taps)
        assert (heads, layers) == expected, taps


def test_pieces_of_few_sizes(
    llama: Path,
    gpu: Device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else each length would be a step of its own, to be captured; and this one is, without a word
    of warning."""
    model, keys, bare = make_model(llama, gpu, torch.bfloat16), list[Hashable](), gpu.run

    def run_step(key: Hashable, launch: Any) -> bool:
        keys.append(key)
        return bare(key, launch)

    batch = prefilled(model, 149)
    monkeypatch.setattr(gpu, "run", run_step)
    for count in (145, 149, 131):
        batch.cache.close(batch.sequences[0])
        sequence = batch.cache.open(count)
        for _ in model.extend(TEXT[:count], batch.update([sequence])):
            pass
    assert len(keys) == 3 and len(set(keys)) == 1  # two chains of 80 rows
    assert not caplog.messages


@only_simulated
def test_one_pass_for_several_chains(llama: Path, gpu: Device) -> None:
    """As many launches as for one, but for the rotation, which is no part of attention there."""
    model, simt = make_model(llama, gpu, torch.bfloat16), load_simt()
    counts = []
    for num_tokens in (9, 149):
        before = simt.num_launches()
        prefilled(model, num_tokens)
        counts.append(simt.num_launches() - before)
    whole_layers = SIZES["num_hidden_layers"] - 1
    assert counts[1] - counts[0] == whole_layers


# --- how prompts are cut --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "unit", "chain"), [(GPU_PIECE, 16, 128), (128, 1, 128), (48, 8, 16)]
)
def test_cuts(most: int, unit: int, chain: int) -> None:
    for num_tokens in range(2 * most + 3):
        found = cuts(num_tokens, most, unit, chain)
        assert [one.start for one in found] == list(range(0, num_tokens, most))
        assert sum(one.count for one in found) == num_tokens
        for one in found:
            assert len(one.counts) == one.num_chains and sum(one.counts) == one.count
            assert all(0 < count <= one.length <= chain for count in one.counts)
            assert one.counts[:-1] == [one.length] * (one.num_chains - 1)
            assert one.length % unit == 0 and one.rows - one.count < unit * one.num_chains
