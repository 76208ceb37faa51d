"""Layers that see a window: the same text in any batch, with any trees, from any start, and no more
of their pages than the window needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

from specrt.cache import SCRATCH_PAGE
from specrt.config import Form, LayerKind, ModelConfig
from specrt.device import Device
from specrt.draft.base import Drafter, DraftParams, EmptyDrafter
from specrt.draft.eesd.checkpoint import ExitConfig, load_exit, read_exit
from specrt.draft.eesd.drafter import EesdDrafter
from specrt.draft.eesd.launched import LaunchedEesdDrafter
from specrt.draft.eesd.model import ExitModel
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.draft.small_model.on_device import DeviceSmallModelDrafter
from specrt.engine import memory
from specrt.engine.engine import Engine
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from tests import watched_windows
from tests.engine.exits import COSTS, make_exit_pair
from tests.engine.support import RandomTreeDrafter, make_engine, texts
from tests.engine.test_arrivals import PLANTED, Rig, make_cases, run_all
from tests.engine.test_launched import OneAfterAnother, PlannedTrees
from tests.ops.conftest import load_simt
from tests.simulated_gpu import SimulatedGpu, call_host, only_simulated

VOCAB = 97
PAGE = 64
MIXED, ALL = (24, None, 40), (24, 24, 24)
LONG = [(11 * i * i + 3 * i) % VOCAB for i in range(110)]
PROMPTS = [LONG, [3], LONG[40:]]
SIZES = {
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "dtype": torch.bfloat16,
}
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)


def windowed(config: ModelConfig, windows: Sequence[int | None]) -> ModelConfig:
    layers = tuple(LayerKind(window) for window in windows)
    return replace(config, form=replace(config.form, layers=layers))


@pytest.fixture(params=[MIXED, ALL], ids=["mixed", "all"])
def model(
    request: pytest.FixtureRequest, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> LlamaModel:
    config = ModelConfig.from_directory(checkpoint)
    weights = load_weights(checkpoint, config, torch.float32)
    made = LlamaModel(windowed(config, request.param), weights, Device(is_eager=True))
    watched_windows.watch(monkeypatch)
    return made


def held(engine: Engine) -> list[int]:
    return [pool.num_held_pages for pool in engine.cache.pools]


def poison(engine: Engine) -> None:
    """What stands where pages were given back reaches no result."""
    for pool in engine.cache.pools:
        pool.kv[:, :, SCRATCH_PAGE].fill_(float("nan"))


def say(engine: Engine, params: SamplingParams = GREEDY) -> list[list[int]]:
    poison(engine)
    results = engine.generate(PROMPTS, params)
    assert [result.error for result in results] == [None] * len(PROMPTS)
    assert held(engine) == [0] * len(engine.cache.pools)
    return texts(results)


def test_texts_are_the_same_however_they_are_made(model: LlamaModel) -> None:
    """One after another, in a batch, with trees, in small chunks, computed again half-way."""
    expected = say(make_engine(model, max_batch=1))
    full = LlamaModel(windowed(model.config, [None] * 3), model.weights, Device(is_eager=True))
    assert say(make_engine(full)) != expected
    answers = {tuple(p): a for p, a in zip(PROMPTS, expected, strict=True)}
    drafter = RandomTreeDrafter(answers, VOCAB, 20, hit_rate=0.9)
    assert say(make_engine(model, drafter, max_nodes=20)) == expected
    assert say(make_engine(model, max_batch=3, prefill_chunk=7)) == expected
    # Whoever came last gives its pages up, and its tokens are a prompt then.
    short = make_engine(model, drafter, max_nodes=20, max_cached_tokens=4 * PAGE)
    preempted = list[object]()
    places = short._core._places
    preempt = places.preempt
    places.preempt = lambda request: (preempted.append(request), preempt(request))
    assert say(short) == expected
    assert preempted


def test_a_windowed_model_drafts_too(model: LlamaModel) -> None:
    expected = say(make_engine(model))
    drafter = SmallModelDrafter(model, depth=3)
    engine = make_engine(model, drafter)
    results = engine.generate(PROMPTS, GREEDY)
    assert texts(results) == expected
    # It is its own small model: all that it says is taken.
    assert min(result.stats.tau for result in results) > 3.5
    assert drafter.cache.num_held_pages == 0


def test_a_long_text_holds_what_its_windows_see(model: LlamaModel) -> None:
    """Ten times as long as the window, and longer."""
    engine = make_engine(model, max_nodes=8, prefill_chunk=128)
    handle, most = engine.add(LONG * 3, replace(GREEDY, max_new_tokens=120)), [0] * 3
    ends = list[object]()
    while not engine.is_idle:
        ends += [chunk.result for chunk in engine.step() if chunk.result is not None]
        most = [max(pair) for pair in zip_longest(held(engine), most, fillvalue=0)]
    assert handle is not None and len(ends) == 1
    windows = [group.window for group in engine.cache.groups]
    # Before the last round 448 tokens are held; a window and a round lie on two pages.
    assert most[: len(windows)] == [7 if window is None else 2 for window in windows]


def test_a_limit_that_only_a_window_fits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers that all see a window tokens are held only while they are seen."""
    config = ModelConfig.from_directory(checkpoint)
    weights = load_weights(checkpoint, config, torch.float32)
    model = LlamaModel(windowed(config, ALL), weights, Device(is_eager=True))
    watched_windows.watch(monkeypatch)
    engine = make_engine(model, max_nodes=8, prefill_chunk=64, max_cached_tokens=3 * PAGE)
    result = engine.generate(LONG * 3, GREEDY)
    assert result.error is None and len(result.token_ids) == 40
    assert engine.cache.pools[0].num_pages == 3


def run_windowed(checkpoint: Path, seeds: range, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Arrivals, failures and interrupts at random, on pages so small that many are given back."""
    monkeypatch.setattr(memory, "PAGE_SIZE", 8)
    config = ModelConfig.from_directory(checkpoint)
    weights = load_weights(checkpoint, config, torch.float32)
    model = LlamaModel(windowed(config, (5, None, 17)), weights, Device(is_eager=True))
    watched_windows.watch(monkeypatch)
    cases = make_cases(model, 8)
    answers = {case.prompt: case.expected.token_ids for case in cases}
    drafters: dict[str, Drafter] = {
        "random trees": RandomTreeDrafter(answers, VOCAB, 16, hit_rate=0.8),
        "plain": EmptyDrafter(),
        "small model": SmallModelDrafter(model, depth=3, width=2),
    }
    return run_all(Rig(model, drafters, cases), seeds, 12, monkeypatch)


def test_arrivals_at_random(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened = run_windowed(checkpoint, range(2), monkeypatch)
    assert happened["preempted"] and happened["interrupted"] and happened["ended: length"]


@pytest.mark.slow
def test_arrivals_at_random_many_times(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened = run_windowed(checkpoint, range(100, 150), monkeypatch)
    assert not [name for name in PLANTED if happened[name] == 0], happened


# --- on a GPU -------------------------------------------------------------------------------------


PAIR = [LONG[:50], [3]]
FEW = replace(GREEDY, max_new_tokens=24)


def told(engine: Engine, params: SamplingParams = FEW) -> list[list[int]]:
    poison(engine)
    results = engine.generate(PAIR, params)
    assert [result.error for result in results] == [None] * len(PAIR)
    assert held(engine) == [0] * len(engine.cache.pools)
    return texts(results)


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_exit_pair(tmp_path_factory.mktemp("exits"), **SIZES)


def there(exits: tuple[Path, Path], gpu: Device) -> LlamaModel:
    config = ModelConfig.from_directory(exits[0])
    weights = place_weights(load_weights(exits[0], config, torch.bfloat16), gpu)
    return LlamaModel(windowed(config, (24, None, None, 20)), weights, gpu)


def exit_of(model: LlamaModel, path: Path) -> ExitModel:
    """A windowed target's exit, whose layer sees what the target's last one does."""
    plain = replace(model.config, form=Form())
    config = read_exit(path, plain)
    form = ExitConfig.for_target(model.config, config.exit_layer, name="target").layer.form
    assert form.layers == (LayerKind(20),)
    config = replace(config, layer=replace(config.layer, form=form))
    return ExitModel(config, load_exit(path, config, model.weights, model.device), model)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PAGE_SIZE", 8)


@pytest.mark.usefixtures("small_pages")
def test_a_drafter_runs_windowed_layers(
    exits: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By trees in the target's own tables, and a layer of its own that sees a window."""
    model = there(exits, Device(is_eager=True))
    drafter = EesdDrafter(exit_of(model, exits[1]), costs=COSTS)
    watched_windows.watch(monkeypatch)
    expected = told(make_engine(model))
    engine = make_engine(model, drafter, max_nodes=16)
    shape = DraftParams(depth=3, top_k=2, total_tokens=7)
    assert texts(engine.generate(PAIR, FEW, draft=shape)) == expected
    assert told(engine) == expected
    assert drafter.cache.groups[0].window == 20 and drafter.cache.num_held_pages == 0


@pytest.fixture
def on_gpu(exits: tuple[Path, Path], gpu: Device, monkeypatch: pytest.MonkeyPatch) -> ExitModel:
    """An exit and its target there."""
    assert isinstance(gpu, SimulatedGpu)
    exit_model = exit_of(there(exits, gpu), exits[1])
    run = partial(call_host, gpu, load_simt())
    watched_windows.watch(monkeypatch, run)
    return exit_model


@only_simulated
@pytest.mark.usefixtures("small_pages")
def test_launched_rounds_a_round_late(on_gpu: ExitModel) -> None:
    """Pages are given back by what the host knows, which is a round old."""
    model, params = on_gpu.target, replace(FEW, max_new_tokens=14)
    expected = told(make_engine(model, OneAfterAnother()), params)
    limits = {"max_batch": 2, "max_nodes": 8, "prefill_chunk": 64}
    drafter = PlannedTrees(model, expected, prompts=PAIR)
    engine = make_engine(model, drafter, **limits, max_cached_tokens=240)
    assert told(engine, params) == expected
    assert drafter.plans > 3
    # A window and three trees of 8 lie on so many pages of 8 at most; a chunk's are 8.
    assert [pool.num_pages for pool in engine.cache.pools] == [30, 2 * 7 + 8, 2 * 7 + 8]


@pytest.mark.slow
@only_simulated
@pytest.mark.usefixtures("small_pages")
def test_launched_drafters_of_windowed_layers(on_gpu: ExitModel) -> None:
    expected = told(make_engine(on_gpu.target))
    drafter = LaunchedEesdDrafter(on_gpu, costs=COSTS)
    assert told(make_engine(on_gpu.target, drafter, max_nodes=8)) == expected
    small = DeviceSmallModelDrafter(on_gpu.target, depth=3)
    results = make_engine(on_gpu.target, small).generate(PAIR, FEW)
    assert texts(results) == expected
    # It is its own small model, which runs its last tokens again to the same bits.
    assert min(result.stats.tau for result in results) > 3
