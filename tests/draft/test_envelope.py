"""What decides depth and size: against brute force, and over many simulated rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from specrt.draft.base import RoundCost
from specrt.draft.envelope import ENVELOPES, EnvelopePolicy

ONE_MS = 10.0


def measured(slope: float = 0.05, one_ms: float = ONE_MS) -> RoundCost:
    """Costs that have settled on a line."""
    cost = RoundCost(slope=slope)
    for rows in (1, 1):
        cost.observe(rows, one_ms)
    return cost


def drafting(policy: EnvelopePolicy, extend: float, level: float) -> EnvelopePolicy:
    """A policy that has measured drafting, in plain rounds."""
    policy.observe_draft(extend * ONE_MS, level * ONE_MS, 1)
    return policy


def falling(rng: np.random.Generator, batch: int, count: int) -> np.ndarray:
    """``[B, N - 1]`` path probabilities, best first."""
    peak = rng.uniform(0.05, 1.0, (batch, 1))
    return -np.sort(-peak * rng.uniform(0, 1, (batch, count)) ** 3, axis=1)


def rate(probs: np.ndarray, size: int, price: float, slope: float, scale: float = 1.0) -> float:
    """Tokens per plain round's time of a tree of ``size`` nodes a sequence."""
    batch = len(probs)
    tokens = sum(1.0 + scale * sum(row[: size - 1]) for row in probs.tolist())
    return float(tokens / (price + 1.0 + slope * (batch * size - 1)))


# --- size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.005, 0.05, 0.3])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_size_is_the_envelope_of_the_highest_rate(batch: int, slope: float) -> None:
    rng = np.random.default_rng(7 * batch)
    chosen = set()
    for most in (2, 3, 7, 30, 64, 128):
        for _ in range(20):
            probs = falling(rng, batch, most - 1)
            policy = drafting(EnvelopePolicy(), 0.2, 0.1)
            size = policy.size(probs, 3, measured(slope))
            sizes = {*(n for n in ENVELOPES if n < most), most}
            rates = {n: rate(probs, n, 0.2 + 2 * 0.1, slope) for n in sizes}
            assert rates[size] == pytest.approx(max(rates.values()), rel=1e-12)
            chosen.add(size)
    assert len(chosen) >= 4


def test_dear_drafts_want_large_trees() -> None:
    """What was paid for drafting is spread over more tokens."""
    probs = 0.9 ** np.arange(1, 64)[None]
    sizes = [
        drafting(EnvelopePolicy(), price, price).size(probs, 5, measured(0.1))
        for price in (0.0, 0.1, 1.0)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_padding_is_not_verified() -> None:
    probs = np.concatenate([np.full((2, 3), 0.9), np.zeros((2, 60))], axis=1)
    assert EnvelopePolicy().size(probs, 2, measured(0.01)) == 4


def test_nan_promises_nothing() -> None:
    probs = np.full((1, 63), np.nan)
    policy, cost = EnvelopePolicy(), measured()
    assert policy.size(probs, 3, cost) == 1
    assert not policy.expands([math.nan], 1, cost)
    assert not policy.expands([0.9, math.nan], 1, cost)
    assert not policy.expands([math.nan, 0.9], 1, cost)
    policy.observe_outcome(math.nan, 0)
    # It neither outlives the round nor spoils the sequences beside it.
    good = np.full((1, 63), 0.9) ** np.arange(1, 64)
    alone = EnvelopePolicy().size(good, 3, cost)
    fresh = EnvelopePolicy()
    assert fresh.size(np.concatenate([probs, good]), 3, cost) > 1
    fresh.observe_outcome(math.nan, 3)
    assert fresh.size(good, 3, cost) == alone > 1
    assert fresh.expands([0.9], 1, cost)


def test_a_single_node_leaves_one_choice() -> None:
    assert EnvelopePolicy().size(np.empty((3, 0)), 1, measured()) == 1


# --- levels ---------------------------------------------------------------------------------------


def test_hopeful_levels_are_drafted_and_hopeless_ones_not() -> None:
    policy, cost = drafting(EnvelopePolicy(), 0.1, 0.05), measured(0.01)
    assert policy.expands([0.9], 1, cost)
    assert policy.expands([0.9, 0.8], 1, cost)
    assert not policy.expands([0.05], 1, cost)
    assert not policy.expands([0.9, 0.02], 1, cost)
    assert not policy.expands([0.9, 0.0], 1, cost)
    assert not policy.expands([0.0, 0.0], 1, cost)
    assert policy.expands([0.9, 0.8, 0.7], 1, cost)
    assert policy.expands([1.0, 1.0000001], 1, cost)  # rounding may lift a mass above 1


def test_depth_falls_with_the_price_of_a_level_and_with_doubt() -> None:
    def depth(level: float, fall: float, accepted: float = 1.0) -> int:
        policy, cost = drafting(EnvelopePolicy(), level, level), measured(0.01)
        for _ in range(200):
            policy.observe_outcome(4.0, round(4 * accepted))
        masses = [fall]
        while len(masses) < 40 and policy.expands(masses, 1, cost):
            masses.append(masses[-1] * fall)
        return len(masses)

    by_price = [depth(level, 0.8) for level in (0.02, 0.1, 0.3, 2.0)]
    assert by_price == sorted(by_price, reverse=True)
    assert by_price[0] > by_price[2] > by_price[3] == 1
    assert depth(0.05, 0.9) > depth(0.05, 0.6) > depth(0.05, 0.1) == 1
    assert depth(0.05, 0.8) > depth(0.05, 0.8, accepted=0.25)


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "scale"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0), (3.0, 1.5)])
def test_beliefs_are_scaled_by_how_they_turn_out(share: float, scale: float) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        policy = drafting(EnvelopePolicy(), 0.2, 0.1)
        for _ in range(600):
            policy.observe_outcome(4.0, round(4 * share))
        probs = falling(rng, 2, 63)
        size = policy.size(probs, 3, measured(0.02))
        rates = {n: rate(probs, n, 0.4, 0.02, scale) for n in ENVELOPES if n <= 64}
        assert rates[size] == pytest.approx(max(rates.values()), rel=1e-6)


def test_a_root_alone_says_nothing_of_beliefs() -> None:
    probs = 0.8 ** np.arange(1, 64)[None]
    policy = drafting(EnvelopePolicy(), 0.2, 0.1)
    expected = policy.size(probs, 3, measured(0.02))
    for _ in range(3000):
        policy.observe_outcome(0.0, 0)
    assert policy.size(probs, 3, measured(0.02)) == expected > 1


def test_a_preempted_thread_moves_little() -> None:
    """One wild time among ordinary ones leaves the choice as it was."""
    probs = 0.9 ** np.arange(1, 64)[None]
    policies = [EnvelopePolicy(), EnvelopePolicy()]
    for number in range(200):
        for policy in policies:
            policy.observe_draft(1.0, 0.5, 1)
        if number == 150:
            policies[1].observe_draft(5000.0, 5000.0, 1)
    sizes = [policy.size(probs, 4, measured()) for policy in policies]
    assert sizes[0] == sizes[1]
    assert all(policy.expands([0.9, 0.8], 1, measured()) for policy in policies)


# --- whether to draft at all ----------------------------------------------------------------------


@dataclass
class World:
    """Rounds of one sequence with a drafter of a given quality.

    ``belief`` is what it thinks of its best child, ``truth`` how often that is right; both fall
    geometrically with depth. A drafted level costs ``level`` plain rounds.
    """

    policy: EnvelopePolicy
    cost: RoundCost
    belief: float = 0.9
    truth: float = 0.9
    level: float = 0.1
    batch: int = 1

    def round(self, rng: np.random.Generator) -> bool:
        """Whether it drafted."""
        if not self.policy.drafts(self.cost):
            self.verify(1)
            return False
        masses = [self.belief]
        while len(masses) < 8 and self.policy.expands(masses, self.batch, self.cost):
            masses.append(masses[-1] * self.belief)
        levels = len(masses)
        time = self.level * ONE_MS
        self.policy.observe_draft(time, time * (levels - 1), levels - 1)
        probs = np.zeros((self.batch, 63))
        probs[:, :levels] = masses
        size = self.policy.size(probs, levels, self.cost)
        accepted = 0
        for _ in range(self.batch):
            misses = rng.random(size) >= self.truth
            accepted += min(int(misses.argmax()) if misses.any() else size, size - 1, levels)
        self.policy.observe_outcome(float(probs[:, : size - 1].sum()), accepted)
        self.verify(size)
        return True

    def verify(self, size: int) -> None:
        rows = size * self.batch
        self.cost.observe(rows, ONE_MS * (1.0 + 0.02 * (rows - 1)))

    def share(self, num_rounds: int, rng: np.random.Generator) -> float:
        """Of rounds that drafted."""
        return sum(self.round(rng) for _ in range(num_rounds)) / num_rounds


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_never_before_a_plain_round_was_measured(rng: np.random.Generator) -> None:
    policy, cost = EnvelopePolicy(), RoundCost()
    assert not any(policy.drafts(cost) for _ in range(1000))
    cost.observe(1, 500.0)  # it also records a graph
    assert not policy.drafts(cost)
    cost.observe(1, ONE_MS)
    assert policy.drafts(cost)


def test_a_batch_tells_the_time_of_one_row_and_follows_the_machine() -> None:
    cost = RoundCost(slope=0.05)
    times = {8: 1.35, 48: 3.35, 128: 7.35}
    for speed in (1.0, 3.0):  # then another process takes its share
        for _ in range(400):
            for rows, relative in times.items():
                cost.observe(rows, speed * ONE_MS * relative)
        assert cost.one_ms == pytest.approx(speed * ONE_MS, rel=0.05)
        for rows, relative in times.items():
            assert cost.relative(rows) == pytest.approx(relative, rel=0.05)
    for _ in range(2):
        cost.observe(1, 40.0)
    assert cost.one_ms == 40.0


@pytest.mark.parametrize("batch", [1, 4])
def test_a_good_drafter_drafts_nearly_always(rng: np.random.Generator, batch: int) -> None:
    """In a batch no round ever verifies one row alone; the cost of one is still known."""
    world = World(EnvelopePolicy(), RoundCost(), batch=batch)
    assert world.share(1000, rng) > 0.98


def test_now_and_then_a_plain_round_is_measured(rng: np.random.Generator) -> None:
    world = World(EnvelopePolicy(), RoundCost())
    assert world.share(10, rng) == 0.8  # the first records the graph, the second is timed
    plain = [number for number in range(1100) if not world.round(rng)]
    assert len(plain) == 4
    assert {after - before for before, after in pairwise(plain)} == {257}


@pytest.mark.parametrize(
    ("belief", "truth", "level"),
    [(0.1, 0.1, 0.3), (0.5, 0.5, 2.0), (0.99, 0.0, 0.2), (0.99, 0.1, 0.3)],
)
def test_drafting_that_loses_stops_and_is_tried_more_and_more_rarely(
    rng: np.random.Generator, belief: float, truth: float, level: float
) -> None:
    """Unsure, dear, and two that are sure and wrong."""
    world = World(EnvelopePolicy(), RoundCost(), belief, truth, level)
    world.share(400, rng)
    assert world.share(2000, rng) < 0.05
    tries = [number for number in range(2000) if world.round(rng)]
    gaps = [after - before for before, after in pairwise(tries)]
    assert tries and max(gaps) == 129


@pytest.mark.parametrize(("belief", "truth"), [(0.05, 0.05), (0.95, 0.0), (0.3, 0.0)])
def test_it_comes_back_when_drafting_wins(
    rng: np.random.Generator, belief: float, truth: float
) -> None:
    world = World(EnvelopePolicy(), RoundCost(), belief, truth, level=0.3)
    assert world.share(3000, rng) < 0.2
    world.belief = world.truth = 0.95
    world.level = 0.05
    world.share(300, rng)  # two of the longest pauses
    assert world.share(1000, rng) > 0.98


def test_the_first_pause_is_short(rng: np.random.Generator) -> None:
    policy, cost = EnvelopePolicy(), measured()
    hopeless = np.full((1, 63), 1e-3)
    pauses = []
    for _ in range(6):
        assert policy.drafts(cost)
        assert policy.size(hopeless, 1, cost) == 1
        pause = 0
        while not policy.drafts(cost):
            pause += 1
        pauses.append(pause)
    assert pauses == [8, 16, 32, 64, 128, 128]
