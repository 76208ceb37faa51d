"""EESD's rounds as launches alone, on a GPU, simulated or real: the chains of hosted rounds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Budget, DraftParams, LaunchedDrafter, StageTimes
from specrt.draft.eesd.costs import CostMeter
from specrt.draft.eesd.launched import LaunchedEesdDrafter
from specrt.draft.eesd.sequences import REST
from specrt.draft.length.costs import RoundCost
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from specrt.types import RoundReport, SequenceState
from tests.drafters.launched_rig import Rounds
from tests.engine.exits import make_exit_pair, make_launched_drafter
from tests.interrupts import interrupted

SIZES = {
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 320,
    "dtype": torch.bfloat16,
}
PROMPTS = [[(7 * i * i + i) % 90 for i in range(n)] for n in (9, 20)]
MIXED = [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=5)]


@dataclass(frozen=True)
class Loaded:
    config: ModelConfig
    weights: Weights
    exit: Path

    def on(self, gpu: Device) -> LlamaModel:
        return LlamaModel(self.config, place_weights(self.weights, gpu), gpu)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    target, directory = make_exit_pair(tmp_path_factory.mktemp("eesd"), **SIZES)
    config = ModelConfig.from_directory(target)
    return Loaded(config, load_weights(target, config, torch.bfloat16), directory)


@pytest.fixture
def model(loaded: Loaded, gpu: Device) -> LlamaModel:
    return loaded.on(gpu)


def rounds(
    model: LlamaModel,
    loaded: Loaded,
    kind: str = "fixed",
    draft: DraftParams | None = None,
    **options: object,
) -> Rounds:
    drafter = make_launched_drafter(model, loaded.exit, kind, **options)
    assert isinstance(drafter, LaunchedDrafter)
    return Rounds(model, drafter, PROMPTS, MIXED, draft)


def said(done: Rounds) -> list[list[int]]:
    return [state.token_ids[state.prompt_len :] for state in done.states]


@pytest.mark.parametrize(
    ("kind", "draft"),
    [
        ("calibration-ts", None),
        pytest.param("fixed", DraftParams(depth=3), marks=pytest.mark.slow),
    ],
    ids=["controlled", "fixed depth"],
)
def test_chains_are_those_of_hosted_rounds(
    model: LlamaModel, loaded: Loaded, kind: str, draft: DraftParams | None
) -> None:
    """Greedy and coupled; each goes on where the other ended, and learns what it learned."""
    options = {"draft_len": 3} if kind == "fixed" else {"max_draft": 3}
    launched, hosted = (rounds(model, loaded, kind, draft, **options) for _ in range(2))
    launched.launched(2)
    hosted.told_at_once(2)
    launched.told_at_once(1)
    hosted.launched(1)
    for one, other in zip(launched.trees, hosted.trees, strict=True):
        assert torch.equal(one.num_nodes, other.num_nodes)
        for name in ("draft_tokens", "parents"):
            for ours, theirs, size in zip(
                getattr(one, name), getattr(other, name), one.num_nodes, strict=True
            ):
                assert torch.equal(ours[:size], theirs[:size])
    assert said(launched) == said(hosted)
    assert sum(map(len, said(launched))) > 7
    if draft is None:
        ours, theirs = (
            [done.drafter.control.posterior(state) for state in done.states]  # type: ignore[attr-defined]
            for done in (launched, hosted)
        )
        assert ours == theirs


def test_levels_that_nobody_wants_are_not_run(model: LlamaModel, loaded: Loaded) -> None:
    """The chains end there, whatever a proposal says of them."""
    done = rounds(model, loaded, "threshold", threshold=1.0, max_draft=4)
    done.launched(1)
    (tree,) = done.trees
    assert tree.draft_tokens.shape == (2, 5)  # as long as it may have to be
    assert (tree.num_nodes == 2).all()
    (run,) = done._runs.values()
    assert (model.device.read(run._chains.draft_tokens)[:, 2:] == -1).all()
    assert not (model.device.read(run.states)[:, 2:] != 0).any()


def test_a_rounds_size(model: LlamaModel, loaded: Loaded) -> None:
    drafter = make_launched_drafter(model, loaded.exit, "threshold", max_draft=12)

    def levels(draft: DraftParams | None = None, length: int = 20, max_nodes: int = 64) -> int:
        """-1 where the host is needed."""
        state = SequenceState([1] * length, length, 320, 0, 0.0)
        drafter.start(state)
        drafter._drafts[state].num_ahead = 13
        plan = drafter.plan([state], Budget(max_nodes, RoundCost(), draft))
        drafter.finish(state)
        return -1 if plan is None else plan.num_nodes - 1

    assert levels() == 12 and levels(max_nodes=4) == 3 and levels(max_nodes=1) == 0
    for wanted, size in ((6.2, 8), (2.5, 4), (0.9, 2), (0.0, 1)):
        drafter._wanted = wanted
        assert levels() == size
    assert [levels(DraftParams(depth=depth)) for depth in (0, 5)] == [0, 5]
    assert levels(DraftParams(total_tokens=3)) == 1
    assert levels(DraftParams(top_k=2)) == -1
    # With 13 nodes under way, 6 to come, and no row for the last token: 320 positions are full.
    assert levels(DraftParams(depth=5), 302) == 5 and levels(DraftParams(depth=5), 303) == -1
    drafter = make_launched_drafter(model, loaded.exit, "threshold", max_draft=12)
    drafter.cache.fix(2)
    assert levels(DraftParams(depth=5), 110) == 5 and levels(DraftParams(depth=5), 111) == -1


def test_pages_are_for_a_sequences_own_round_that_is_under_way(
    model: LlamaModel, loaded: Loaded
) -> None:
    """Whoever else's was planned since."""
    drafter = make_launched_drafter(model, loaded.exit)
    one, other = (SequenceState([1] * 60, 60, 320, 0, 0.0) for _ in range(2))
    for state, depth in ((one, 5), (other, 0), (one, 0)):
        if state not in drafter._drafts:
            drafter.start(state)
        assert drafter.plan([state], Budget(64, RoundCost(), DraftParams(depth=depth)))
    held = [len(drafter._drafts[state].cached.pages) for state in (one, other)]
    assert held == [2, 1]  # of 64 rows each: 59 + 6 + 1, and 59 + 1


def test_an_interrupted_end_is_made_up_for(model: LlamaModel, loaded: Loaded) -> None:
    drafter = make_launched_drafter(model, loaded.exit)
    state, number, was_interrupted = SequenceState([1] * 60, 60, 320, 0, 0.0), 1, True
    num_free = len(drafter.control._free)
    while was_interrupted:
        drafter.start(state)
        drafter.cache.reserve(drafter._drafts[state].cached, 70)
        was_interrupted = interrupted(lambda: drafter.finish(state), number)
        drafter.finish(state)
        assert drafter.cache.num_held_pages == 0 and not drafter._drafts, number
        assert len(drafter.control._free) == num_free
        number += 1
    assert number > 4


def test_where_drafting_does_not_pay_it_rests(model: LlamaModel, loaded: Loaded) -> None:
    like = make_launched_drafter(model, loaded.exit, "cost-aware")
    drafter = LaunchedEesdDrafter(like.exit_model, like.control.options)
    drafter._meter._plain_left = 0
    state = SequenceState([1] * 20, 20, 320, 0, 0.0)
    drafter.start(state)

    def run(num_nodes: int) -> int:
        plan = drafter.plan([state], Budget(64, RoundCost()))
        assert plan is not None
        report = RoundReport(
            *np.array([[num_nodes], [0], [1]], np.int32), np.zeros((1, 1), np.int32)
        )
        drafter.told([state], plan, report, StageTimes(0.1, 1.0, 0.1))
        return plan.num_nodes

    sizes = [run(num_nodes) for num_nodes in (3, 1, *[1] * REST, 2, 2)]
    assert sizes == [9, 9, *[1] * (REST - 1), 9, *[1] * 2]


def test_a_meter_of_launched_rounds(model: LlamaModel, loaded: Loaded) -> None:
    """A step's time, though no report says how many of them were run."""
    exit_model = make_launched_drafter(model, loaded.exit).exit_model
    meter, rng = CostMeter(exit_model), random.Random(0)
    for number in range(60):
        longest, dropped = rng.choice([(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (4, 0)])
        if number % 4 == 0:
            meter.observe_launched(1, 0, 0, StageTimes(0.5, 1.5, 0.1))
        else:
            draft = 0.5 + 0.8 * (longest + dropped)
            meter.observe_launched(1, 4, longest, StageTimes(draft, 1.5, 0.1))
    costs = meter.costs(1)
    assert costs.step == pytest.approx(0.8) and costs.lower == pytest.approx(0.5)
    assert costs.verify == pytest.approx(1.6, rel=0.05) and costs.row < 0.05
