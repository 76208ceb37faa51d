"""EESD's rounds as launches alone, in whole engines: one graph a round, and the same text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from specrt.draft.base import Budget, DraftParams, RoundPlan
from specrt.draft.eesd.launched import LaunchedEesdDrafter
from specrt.draft.length.control import CONTROLLERS
from specrt.engine.launched import LaunchedRounds
from specrt.engine.results import GenerationResult
from specrt.models.launched_run import LaunchedRun
from specrt.models.model import LlamaModel
from specrt.types import Proposal, SequenceState
from tests.engine.exits import EXIT_LAYER, NUM_LAYERS, make_launched_drafter
from tests.engine.support import make_engine, texts
from tests.engine.test_eesd_on_device import (
    CHEAP,
    GREEDY,
    PARAMS,
    PROMPTS,
    Loaded,
    num_accepted,
    recomputed,
    rows_of,
)
from tests.engine.test_eesd_on_device import expected as expected
from tests.engine.test_eesd_on_device import loaded as loaded
from tests.engine.test_eesd_on_device import model as model
from tests.real_gpu import RealGpu
from tests.simulated_gpu import SimulatedGpu, only_simulated


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each launch that was made, whether verification began behind the layers that it ran."""
    seen: list[bool] = []
    take = LaunchedRun.taken

    def listen(self: LaunchedRun, proposal: Proposal) -> Proposal | None:
        chains = take(self, proposal)
        seen.append(chains is not None)
        return chains

    monkeypatch.setattr(LaunchedRun, "taken", listen)
    return seen


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nodes of each launched round."""
    seen: list[int] = []
    launch = LaunchedRounds.launch

    def listen(self: LaunchedRounds, planned: Any, *rest: Any) -> object:
        seen.append(planned.plan.num_nodes)
        return launch(self, planned, *rest)

    monkeypatch.setattr(LaunchedRounds, "launch", listen)
    return seen


def generated(drafter: LaunchedEesdDrafter, max_batch: int = 2) -> list[GenerationResult]:
    """By an engine that sequences join and leave."""
    engine = make_engine(drafter.exit_model.target, drafter, max_batch=max_batch)
    results = engine.generate(PROMPTS, PARAMS)
    assert engine.cache.num_held_pages == drafter.cache.num_held_pages == 0
    return results


class Flighty(LaunchedEesdDrafter):
    """Wants the host now and then."""

    rng: random.Random

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan | None:
        plan = super().plan(states, budget)
        return None if self.rng.random() < 0.3 else plan


@pytest.mark.parametrize(
    ("kind", "is_eager"),
    [("calibration-ts", False)]
    + [
        pytest.param(kind, is_eager, marks=pytest.mark.slow)
        for kind in CONTROLLERS
        for is_eager in (False, True)
    ],
)
def test_chains(
    model: LlamaModel,
    loaded: Loaded,
    expected: list[list[int]],
    taken: list[bool],
    launched: list[int],
    kind: str,
    is_eager: bool,
) -> None:
    """Sequences join and leave, greedy and seeded, and all is launched."""
    model.device._is_eager = is_eager
    drafter = make_launched_drafter(model, loaded.exit, kind, max_draft=3, draft_len=3)
    drafter._given_costs = CHEAP
    results = generated(drafter)
    assert texts(results) == expected
    assert num_accepted(results) > 3
    assert set(launched) == {4} and taken and all(taken)


@pytest.mark.slow
def test_an_exit_that_is_never_wrong(
    model: LlamaModel, loaded: Loaded, expected: list[list[int]]
) -> None:
    """Nothing is amiss with caches, positions, noise or states, or it would err."""
    drafter = make_launched_drafter(model, loaded.perfect, "fixed", draft_len=4)
    results = generated(drafter)
    assert texts(results) == expected
    assert [one.stats.accept_lengths for one in results[:2]] == [[4], [4, 1]]


def test_by_turns_with_the_host(
    model: LlamaModel,
    loaded: Loaded,
    expected: list[list[int]],
    gpu: SimulatedGpu | RealGpu,
    launched: list[int],
) -> None:
    """Plain and drafted rounds of both go on where the other has ended: the exit's cache is what it
    would be from scratch."""
    like = make_launched_drafter(model, loaded.perfect, "cost-aware")
    drafter = Flighty(like.exit_model, like.control.options)
    drafter.rng, drafter._meter._plain_left = random.Random(3), 1
    engine = make_engine(model, drafter)
    handles = [
        engine.add(prompt, replace(params, max_new_tokens=20))
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]
    for _ in range(4):
        engine.step()
    engine.abort(handles[0])
    while any(len(state.token_ids) < state.prompt_len + 9 for state in drafter._drafts):
        engine.step()
    engine._core._catch_up()
    drafter._catch_up(list(drafter._drafts))
    assert len(drafter._drafts) == 2 and {1} < set(launched)
    for text, (state, draft) in zip(expected[1:], drafter._drafts.items(), strict=True):
        assert state.token_ids[state.prompt_len :][: len(text)] == text
        found = rows_of(gpu, drafter._cache, draft.cached)
        assert found.equal(recomputed(gpu, drafter, state.token_ids[:-1]))


@only_simulated
def test_a_round_is_one_graph_that_runs_each_layer_once_for_each_node(
    model: LlamaModel,
    loaded: Loaded,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, launch = list[int](), LlamaModel.launch_layer

    def noting(self: LlamaModel, index: int, *rest: Any, **options: Any) -> None:
        if self is model:
            layers.append(index)
        launch(self, index, *rest, **options)

    caplog.set_level("DEBUG", "specrt")
    drafter = make_launched_drafter(model, loaded.exit)
    engine = make_engine(model, drafter)
    engine.add(PROMPTS[1], replace(GREEDY, max_new_tokens=12), DraftParams(depth=2))
    monkeypatch.setattr(LlamaModel, "launch_layer", noting)
    while not engine.is_idle:
        engine.step()
    assert [text for text in caplog.messages if "a graph of" in text] == caplog.messages[-1:]
    each = [*range(EXIT_LAYER)] * 3 + [*range(EXIT_LAYER, NUM_LAYERS)]
    assert layers == len(layers) // len(each) * each and layers
