"""EESD on a GPU, simulated or real: nobody waits, drafts go on behind layer N, texts stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from specrt.cache import CacheBatch, CachedSequence, KVCache
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import DraftParams
from specrt.draft.eesd.on_device import DeviceEesdDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.draft.length.control import CONTROLLERS, ControlOptions
from specrt.draft.length.costs import DraftCosts
from specrt.engine.results import GenerationResult
from specrt.models.layer_run import LayerRun, LowerLayers
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from specrt.tree import MAX_NODES
from tests.checkpoints import make_exit_checkpoint
from tests.engine.exits import (
    COSTS,
    EXIT_LAYER,
    NUM_LAYERS,
    make_device_drafter,
    make_exit_pair,
)
from tests.engine.support import make_engine, texts
from tests.ops.conftest import load_simt
from tests.real_gpu import RealGpu
from tests.simulated_gpu import SimulatedGpu, only_simulated

SIZES = {
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "dtype": torch.bfloat16,
}
PROMPTS = [[5, 9, 5, 9, 5] * 3, [3], [7, 8] * 4]
GREEDY = SamplingParams(max_new_tokens=5, ignore_eos=True)
PARAMS = [
    GREEDY,
    replace(GREEDY, temperature=1.0, top_k=7, min_p=0.01, seed=6, max_new_tokens=7),
    replace(GREEDY, temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.2, max_new_tokens=8),
]
FAST_KINDS = "calibration-ts", "cost-aware"
CHEAP = DraftCosts(fixed=0.0, step=0.01, lower=0.01, verify=0.9, row=0.01)
UPPER_LAYERS = 3 * (NUM_LAYERS - EXIT_LAYER) + 1
"""Launches of a pass behind the exit: attention and two norms a layer; the last norm. (``linear``
is stood in for.)"""


@dataclass(frozen=True)
class Loaded:
    config: ModelConfig
    weights: Weights
    exit: Path
    perfect: Path
    """An exit that is the target's last layer."""
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    """What plain decoding says, by device."""

    def on(self, gpu: Device) -> LlamaModel:
        return LlamaModel(self.config, place_weights(self.weights, gpu), gpu)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("eesd")
    target, directory = make_exit_pair(folder, **SIZES)
    make_exit_checkpoint(target, folder / "perfect", NUM_LAYERS - 1)
    config = ModelConfig.from_directory(target)
    weights = load_weights(target, config, torch.bfloat16)
    return Loaded(config, weights, directory, folder / "perfect")


@pytest.fixture
def model(loaded: Loaded, gpu: Device) -> LlamaModel:
    return loaded.on(gpu)


@pytest.fixture
def expected(loaded: Loaded, model: LlamaModel) -> list[list[int]]:
    """Plain decoding's texts there."""
    there = str(model.device)
    if there not in loaded.answers:
        loaded.answers[there] = texts(make_engine(model).generate(PROMPTS, PARAMS))
    return loaded.answers[there]


@pytest.fixture
def taken(expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each round's trees were taken up behind the layers that were run."""
    seen: list[bool] = []
    take = LowerLayers.take

    def listen(self: LowerLayers, *arguments: object) -> LayerRun | None:
        run = take(self, *arguments)  # type: ignore[arg-type]
        seen.append(run is not None)
        return run

    monkeypatch.setattr(LowerLayers, "take", listen)
    return seen


def generated(
    drafter: DeviceEesdDrafter, *shapes: DraftParams | None, max_batch: int = 2
) -> list[GenerationResult]:
    """By an engine that sequences join and leave, and whose host waits once a step.

    Args:
        drafter: drafts.
        *shapes: of each prompt's trees; one for all, or none.
    """
    each = shapes if len(shapes) > 1 else (shapes or (None,)) * len(PROMPTS)
    model = drafter.exit_model.target
    engine = make_engine(model, drafter, max_batch=max_batch)
    handles = [engine.add(*request) for request in zip(PROMPTS, PARAMS, each, strict=True)]
    results = {}
    while not engine.is_idle:
        before = model.device.num_reads
        chunks = engine.step()
        results.update({chunk.handle: chunk.result for chunk in chunks if chunk.result})
        assert model.device.num_reads - before <= 1
    assert engine.cache.num_held_pages == drafter._cache.num_held_pages == 0
    return [results[handle] for handle in handles]


def num_accepted(results: Sequence[GenerationResult]) -> int:
    return sum(result.stats.num_accepted_tokens for result in results)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in FAST_KINDS else pytest.mark.slow)
        for kind in CONTROLLERS
    ],
)
def test_chains(
    model: LlamaModel, loaded: Loaded, expected: list[list[int]], taken: list[bool], kind: str
) -> None:
    drafter = make_device_drafter(model, loaded.exit, kind, max_draft=3, draft_len=3)
    drafter._given_costs = CHEAP
    results = generated(drafter)
    assert texts(results) == expected
    assert num_accepted(results) > 3
    assert sum(taken) >= len(taken) - 2  # of a last token, or one alone, nothing is drafted


@pytest.mark.parametrize(
    "shape",
    [
        DraftParams(top_k=2, total_tokens=7),
        pytest.param(DraftParams(depth=2, top_k=3), marks=pytest.mark.slow),
        pytest.param(DraftParams(depth=3), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_shapes(
    model: LlamaModel,
    loaded: Loaded,
    expected: list[list[int]],
    taken: list[bool],
    shape: DraftParams,
) -> None:
    results = generated(make_device_drafter(model, loaded.exit), shape)
    assert texts(results) == expected
    assert num_accepted(results) > 3
    assert sum(taken) >= len(taken) - 2


@pytest.mark.parametrize("shape", [None, DraftParams(depth=4, top_k=2)], ids=str)
def test_an_exit_that_is_never_wrong(
    model: LlamaModel, loaded: Loaded, expected: list[list[int]], shape: DraftParams | None
) -> None:
    """Nothing is amiss with caches, positions, noise or states, or it would err."""
    drafter = make_device_drafter(model, loaded.perfect, "fixed", draft_len=4)
    results = generated(drafter, shape)
    assert texts(results) == expected
    assert [one.stats.accept_lengths for one in results[:2]] == [[4], [4, 1]]


def test_shapes_of_one_batch(
    model: LlamaModel, loaded: Loaded, expected: list[list[int]], taken: list[bool]
) -> None:
    """Each is asked for by itself: then the whole batch goes through all layers."""
    drafter = make_device_drafter(model, loaded.perfect, "fixed", draft_len=2)
    results = generated(drafter, DraftParams(depth=1), None, None)
    assert texts(results) == expected
    assert set(results[0].stats.accept_lengths[:-1]) == {1}
    assert results[1].stats.accept_lengths[0] == 2
    assert taken  # of who is left


@only_simulated
def test_a_pass_begins_behind_the_exit(
    model: LlamaModel, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    simt, forward, said = load_simt(), LlamaModel.forward, []

    def counted(self: LlamaModel, *given: object, **named: object) -> object:
        before = simt.num_launches()
        output = forward(self, *given, **named)  # type: ignore[arg-type]
        said.append(simt.num_launches() - before)
        return output

    monkeypatch.setattr(LlamaModel, "forward", counted)
    drafter = make_device_drafter(model, loaded.exit, "fixed", draft_len=2)
    make_engine(model, drafter).generate(PROMPTS[:1], GREEDY)
    assert len(said) > 1 and set(said[:-1]) == {UPPER_LAYERS}


def test_measured_costs(model: LlamaModel, loaded: Loaded, expected: list[list[int]]) -> None:
    """Plain rounds come first, whose roots the exit's cache takes afterwards."""
    drafter = make_device_drafter(model, loaded.perfect, "cost-aware")
    measured = DeviceEesdDrafter(drafter.exit_model, ControlOptions("cost-aware"))
    results = generated(measured, max_batch=3)
    assert texts(results) == expected
    assert [one.stats.accept_lengths[:3] for one in results] == [[0, 0, 0]] * 3
    assert measured.costs().plain_ms() not in (COSTS.plain_ms(), 1.0)


def rows_of(gpu: SimulatedGpu | RealGpu, cache: KVCache, sequence: CachedSequence) -> torch.Tensor:
    with gpu.moving():
        pages = cache.kv[:, :, sequence.pages].flatten(2, 3)
        return pages[:, :, : sequence.length].to("cpu", copy=True)


def recomputed(
    gpu: SimulatedGpu | RealGpu, drafter: DeviceEesdDrafter, tokens: list[int]
) -> torch.Tensor:
    """Keys and values ``[1, 2, n, heads, d]`` of the exit for tokens run from scratch."""
    model, exit_model = drafter.exit_model.target, drafter.exit_model
    target, drafts = model.new_cache(), exit_model.new_cache()
    batch = CacheBatch(target, [target.open(len(tokens) + MAX_NODES)])
    exits = CacheBatch(drafts, [drafts.open(len(tokens) + MAX_NODES)])
    for _, taps in model.extend(tokens, batch, taps=drafter.taps):
        exit_model.absorb(taps[exit_model.tap][0], exits)
    return rows_of(gpu, drafts, exits.sequences[0])


@pytest.mark.parametrize("shape", [None, DraftParams(depth=4, top_k=2)], ids=str)
def test_the_exits_cache_is_what_it_would_be_from_scratch(
    model: LlamaModel, loaded: Loaded, gpu: SimulatedGpu | RealGpu, shape: DraftParams | None
) -> None:
    """After plain rounds and accepted paths, of chains and of branches."""
    known = make_device_drafter(model, loaded.perfect, "cost-aware")
    drafter = DeviceEesdDrafter(known.exit_model, ControlOptions("cost-aware"))
    engine = make_engine(model, drafter)
    for prompt, params in zip(PROMPTS[1:], PARAMS[1:], strict=True):
        engine.add(prompt, replace(params, max_new_tokens=20), shape)
    while not drafter._drafts or any(len(s.token_ids) < s.prompt_len + 9 for s in drafter._drafts):
        engine.step()
    drafter._catch_up(list(drafter._drafts))
    for state, draft in drafter._drafts.items():
        found = rows_of(gpu, drafter._cache, draft.cached)
        assert found.equal(recomputed(gpu, drafter, state.token_ids[:-1]))


def test_as_many_levels_as_are_wanted(model: LlamaModel, loaded: Loaded) -> None:
    """Few after rounds of few, and more again; a rule of one length runs just those."""
    drafter, told = make_device_drafter(model, loaded.exit, "threshold"), []
    for wanted in [0] * 40 + [9] * 30:
        told.append(drafter._num_levels())
        drafter._learn_levels(told[-1], min(wanted, told[-1]))
    assert told[0] == 8 and told[40] == 2 and told[-1] > 5
    fixed = make_device_drafter(model, loaded.exit, "fixed", draft_len=3)
    assert fixed._num_levels() == 3


def test_it_is_loaded_where_the_target_is(model: LlamaModel, loaded: Loaded) -> None:
    """Its tables are the target's own, its matrices of the target's dtype."""
    drafter = load_drafter(loaded.perfect, model, None, DrafterOptions())
    assert isinstance(drafter, DeviceEesdDrafter)
    weights = drafter.exit_model._weights
    assert weights.layer.lm_head is model.weights.lm_head
    assert weights.layer.layers[0].down.dtype == weights.calibration.dtype == torch.bfloat16
    for tensor in (weights.layer.arena, weights.layer.final_norm, *vars(weights).values()):
        assert not isinstance(tensor, torch.Tensor) or model.device.holds(tensor)
