"""Sizes of trees whose scores the host does not see, over many simulated rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from specrt.draft.length.control import ControlOptions
from specrt.draft.length.controlled import ControlledPolicy
from specrt.draft.length.costs import GPU_SLOPE, RoundCost
from specrt.draft.length.envelope import GPU_ENVELOPES, RankBelief
from specrt.draft.length.measured import MeasuredPolicy, TreePolicy

ONE_MS, LEVELS, NODES = 10.0, 9, 64


def make_policy() -> MeasuredPolicy:
    return MeasuredPolicy(RankBelief(), GPU_ENVELOPES)


@dataclass
class World:
    """Rounds of ``batch`` sequences whose drafter is right with the chance ``truth`` at each level,
    there by a node that comes ``spread`` ranks too late on average.

    A level costs ``level`` plain rounds, a row more ``row`` of one.
    """

    truth: float = 0.8
    level: float = 0.05
    row: float = 0.002
    spread: float = 3.0
    batch: int = 1
    policy: TreePolicy = field(default_factory=make_policy)
    cost: RoundCost = field(default_factory=lambda: RoundCost(GPU_SLOPE))
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def round(self) -> tuple[int, int, float]:
        """Levels, nodes and tokens of a sequence."""
        choice, levels, size, tokens = self.policy.begin(), 0, 1, 1.0
        if choice is not None:
            masses: list[float] = []
            unseen = np.full((self.batch, 4), np.nan)
            for levels in range(1, LEVELS + 1):
                masses.append(choice.mass(unseen, levels - 1))
                if not choice.expands(masses, self.batch, self.cost):
                    break
            scores = np.full((self.batch, NODES - 1), np.nan)
            size = choice.size(scores, levels, self.cost)
            is_accepted = np.zeros((self.batch, size - 1))
            for row in is_accepted:
                self.accept(row, levels)
            time = self.level * ONE_MS
            self.policy.observe_draft(time, time * (levels - 1), levels - 1)
            choice.observe_outcome(scores[:, : size - 1], is_accepted, levels)
            tokens += is_accepted.sum() / self.batch
        rows = size * self.batch
        self.cost.observe(rows, ONE_MS * (1.0 + self.row * (rows - 1)))
        return levels, size, tokens

    def accept(self, row: np.ndarray, levels: int) -> None:
        rank = -1
        for _ in range(levels):
            rank += int(self.rng.geometric(1.0 / (1.0 + self.spread)))
            if self.rng.random() >= self.truth or rank >= len(row):
                return
            row[rank] = 1.0

    def play(self, num_rounds: int) -> np.ndarray:
        """``[rounds, 3]``"""
        return np.array([self.round() for _ in range(num_rounds)])


def test_shares_of_ranks_and_levels_are_learned() -> None:
    belief = RankBelief()
    rng = np.random.default_rng(1)
    for _ in range(600):
        is_accepted = np.zeros((4, 15))
        for row in is_accepted:
            length = min(4, int(rng.geometric(0.5)) - 1)
            row[[0, 2, 5, 9][:length]] = 1.0
        belief.observe(np.full((4, 15), np.nan), is_accepted, 4)
    unseen = np.full((2, 63), np.nan)
    expected = belief.accepted(unseen, 4)
    assert expected[[0, 2, 5, 9]] / 2 == pytest.approx([0.5, 0.25, 0.125, 0.0625], abs=0.05)
    assert expected[[1, 3, 4, 14]] == pytest.approx(0.0, abs=0.01)
    reached = [belief.reach(unseen, level) for level in range(6)]
    assert reached[:4] == pytest.approx([0.5, 0.25, 0.125, 0.0625], abs=0.05)
    # What was never tried goes on as what was before it.
    assert reached[4] / reached[3] == pytest.approx(0.5, abs=0.1)
    assert expected[15] == pytest.approx(expected[7:15].mean())
    assert expected[15] > expected[14]


def test_no_path_is_longer_than_there_are_levels() -> None:
    for levels in (1, 3):
        assert RankBelief().accepted(np.full((5, 63), np.nan), levels).sum() <= 5 * levels + 1e-9


def test_only_envelopes_are_verified_and_never_more_than_there_are() -> None:
    sizes = {int(size) for size in World(truth=0.7, row=0.01).play(200)[:, 1]}
    assert sizes <= set(GPU_ENVELOPES) and len(sizes) > 1
    assert make_policy().size(np.full((1, 19), np.nan), 3, RoundCost()) in {1, 8, 16, 20}


@pytest.mark.parametrize("batch", [1, 4])
def test_good_drafters_draft_deep_and_nearly_always(batch: int) -> None:
    late = World(truth=0.9, batch=batch).play(400)[200:]
    assert (late[:, 0] > 0).mean() > 0.97
    poor = World(truth=0.4, batch=batch).play(400)[200:]
    poor = poor[poor[:, 0] > 0]
    assert late[:, 0].mean() > poor[:, 0].mean() + 2


def test_what_rows_cost_decides_how_many_are_verified() -> None:
    sizes = [World(row=row).play(500)[300:, 1].mean() for row in (0.0, 0.02, 0.2)]
    assert sizes[0] > 24 > sizes[1] > sizes[2]
    # Nodes that are never right are not verified, cheap as they are.
    assert World(row=0.002, spread=0.0).play(500)[300:, 1].mean() < 17


@pytest.mark.parametrize(("truth", "level"), [(0.05, 0.3), (0.0, 0.1), (0.3, 0.8)])
def test_drafting_that_loses_stops_and_comes_back_when_it_wins(truth: float, level: float) -> None:
    world = World(truth, level)
    world.play(400)
    assert (world.play(1500)[:, 0] > 0).mean() < 0.08
    world.truth, world.level = 0.95, 0.03
    world.play(500)
    assert (world.play(300)[:, 0] > 0).mean() > 0.97


def test_larger_trees_are_tried_again() -> None:
    """A drafter whose further nodes were worth nothing becomes one whose are."""
    world = World(truth=0.9, spread=0.0, row=0.002)
    assert world.play(800)[600:, 1].mean() < 17
    world.spread = 5.0
    assert world.play(1500)[1200:, 1].mean() > 24


@pytest.mark.parametrize("kind", ["fixed", "threshold", "beta-ts", "cost-aware"])
def test_a_controller_goes_by_what_came_of_earlier_rounds(kind: str) -> None:
    worlds = []
    for truth in (0.9, 0.3):
        options = ControlOptions(kind, draft_len=3)
        policy = ControlledPolicy(options, measured=make_policy())
        worlds.append(World(truth, policy=policy).play(500)[250:])
    depths = [world[world[:, 0] > 0, 0].mean() for world in worlds]
    if kind == "fixed":
        assert depths == [3.0, 3.0]
    else:
        assert depths[0] > depths[1] + 1
    assert all(set(world[:, 1].astype(int)) <= set(GPU_ENVELOPES) for world in worlds)
