"""What decides depth and size: against brute force, and over many simulated rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest

from specrt.draft.length.costs import RoundCost
from specrt.draft.length.measured import ENVELOPES, Calibration, MeasuredPolicy

ONE_MS = 10.0


@lru_cache  # read, never written
def measured(slope: float = 0.05, one_ms: float = ONE_MS) -> RoundCost:
    """Costs that have settled on a line."""
    cost = RoundCost(slope=slope)
    for rows in (1, 9):
        for _ in range(300):
            cost.observe(rows, one_ms * (1.0 + slope * (rows - 1)))
    return cost


def drafting(policy: MeasuredPolicy, extend: float, level: float) -> MeasuredPolicy:
    """A policy that has measured drafting, in plain rounds."""
    policy.observe_draft(extend * ONE_MS, level * ONE_MS, 1)
    return policy


def falling(rng: np.random.Generator, batch: int, count: int) -> np.ndarray:
    """``[B, N - 1]`` path probabilities, best first."""
    peak = rng.uniform(0.05, 1.0, (batch, 1))
    return -np.sort(-peak * rng.uniform(0, 1, (batch, count)) ** 3, axis=1)


def logs(probs: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(probs)


def rate(probs: np.ndarray, size: int, price: float, slope: float, scale: float = 1.0) -> float:
    """Tokens per plain round's time of a tree of ``size`` nodes a sequence."""
    batch = len(probs)
    tokens = sum(1.0 + sum(min(1.0, scale * p) for p in row[: size - 1]) for row in probs.tolist())
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
            policy = drafting(MeasuredPolicy(), 0.2, 0.1)
            size = policy.size(logs(probs), 3, measured(slope))
            sizes = {*(n for n in ENVELOPES if n < most), most}
            rates = {n: rate(probs, n, 0.2 + 2 * 0.1, slope) for n in sizes}
            assert rates[size] == pytest.approx(max(rates.values()), rel=1e-6)
            chosen.add(size)
    assert len(chosen) >= 4


def test_dear_drafts_want_large_trees() -> None:
    """What was paid for drafting is spread over more tokens."""
    probs = 0.9 ** np.arange(1, 64)[None]
    sizes = [
        drafting(MeasuredPolicy(), price, price).size(logs(probs), 5, measured(0.1))
        for price in (0.0, 0.1, 1.0)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_padding_is_not_verified() -> None:
    probs = np.concatenate([np.full((2, 3), 0.9), np.zeros((2, 60))], axis=1)
    assert MeasuredPolicy().size(logs(probs), 2, measured(0.01)) == 4


def test_nan_promises_nothing() -> None:
    scores = np.full((1, 63), np.nan)
    policy, cost = MeasuredPolicy(), measured()
    assert policy.size(scores, 3, cost) == 1
    assert policy.mass(scores, 0) == 0.0
    for masses in ([math.nan], [0.9, math.nan], [math.nan, 0.9]):
        assert not policy.expands(masses, 1, cost)
    # It neither outlives the round nor spoils the sequences beside it.
    good = logs(np.full((1, 63), 0.9) ** np.arange(1, 64))
    alone = MeasuredPolicy().size(good, 3, cost)
    fresh = MeasuredPolicy()
    assert fresh.size(np.concatenate([scores, good]), 3, cost) > 1
    fresh.observe_outcome(scores, np.zeros((1, 63)), 3)
    assert fresh.size(good, 3, cost) == alone > 1
    assert fresh.expands([0.9], 1, cost)


def test_a_single_node_leaves_one_choice() -> None:
    assert MeasuredPolicy().size(np.empty((3, 0)), 1, measured()) == 1


# --- levels ---------------------------------------------------------------------------------------


def test_hopeful_levels_are_drafted_and_hopeless_ones_not() -> None:
    policy, cost = drafting(MeasuredPolicy(), 0.1, 0.05), measured(0.01)
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
        policy, cost = drafting(MeasuredPolicy(), level, level), measured(0.01)
        believed = logs(fall ** np.arange(1, 41)[None])
        for _ in range(600):
            policy.observe_outcome(believed, accepted * np.exp(believed), 40)
        masses = [policy.mass(believed[:, :1], 0)]
        while len(masses) < 40 and policy.expands(masses, 1, cost):
            level = len(masses)
            masses.append(policy.mass(believed[:, level : level + 1], level))
        return len(masses)

    by_price = [depth(level, 0.8) for level in (0.02, 0.1, 0.3, 2.0)]
    assert by_price == sorted(by_price, reverse=True)
    assert by_price[0] > by_price[2] > by_price[3] == 1
    assert depth(0.05, 0.9) > depth(0.05, 0.6) > depth(0.05, 0.1) == 1
    assert depth(0.05, 0.8) > depth(0.05, 0.8, accepted=0.25)


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, 2.0])
def test_beliefs_are_corrected_by_how_they_turn_out(share: float) -> None:
    rng = np.random.default_rng(3)
    for _ in range(6):
        probs = falling(rng, 2, 63)
        policy = drafting(MeasuredPolicy(), 0.2, 0.1)
        for _ in range(400):
            policy.observe_outcome(logs(probs), share * probs, 3)
        size = policy.size(logs(probs), 3, measured(0.02))
        rates = {n: rate(probs, n, 0.4, 0.02, share) for n in ENVELOPES if n <= 64}
        assert rates[size] == pytest.approx(max(rates.values()), rel=5e-3)


def test_each_class_of_belief_has_its_own_correction() -> None:
    """Sure nodes that hold and doubtful ones that never do, in one tree."""
    calibration = Calibration()
    scores = logs(np.array([[0.97, 0.5, 0.02]]))
    for _ in range(900):
        calibration.observe(scores, np.array([[0.97, 0.8, 0.0]]), 3)
    assert calibration(scores)[0] == pytest.approx([0.97, 0.8, 0.0], abs=1e-3)
    for _ in range(20):
        calibration.forgive()
    assert calibration(scores)[0] == pytest.approx([0.97, 0.5, 0.02], rel=0.01)


def test_a_root_alone_says_nothing_of_beliefs() -> None:
    probs = 0.8 ** np.arange(1, 64)[None]
    policy = drafting(MeasuredPolicy(), 0.2, 0.1)
    expected = policy.size(logs(probs), 3, measured(0.02))
    for _ in range(3000):
        policy.observe_outcome(np.empty((1, 0)), np.empty((1, 0)), 3)
    assert policy.size(logs(probs), 3, measured(0.02)) == expected > 1


def test_a_preempted_thread_moves_little() -> None:
    """One wild time among ordinary ones leaves the choice as it was."""
    probs = 0.9 ** np.arange(1, 64)[None]
    policies = [MeasuredPolicy(), MeasuredPolicy()]
    for number in range(200):
        for policy in policies:
            policy.observe_draft(1.0, 0.5, 1)
        if number == 150:
            policies[1].observe_draft(5000.0, 5000.0, 1)
    sizes = [policy.size(logs(probs), 4, measured()) for policy in policies]
    assert sizes[0] == sizes[1]
    assert all(policy.expands([0.9, 0.8], 1, measured()) for policy in policies)


# --- whether to draft at all ----------------------------------------------------------------------


@dataclass
class World:
    """Rounds of one sequence with a drafter of a given quality.

    ``belief`` is what it thinks of its best child, ``truth`` how often that is right; both fall
    geometrically with depth. A drafted level costs ``level`` plain rounds.
    """

    policy: MeasuredPolicy
    cost: RoundCost
    belief: float = 0.9
    truth: float = 0.9
    level: float = 0.1
    batch: int = 1

    def round(self, rng: np.random.Generator) -> bool:
        """Whether it drafted."""
        if not self.policy.begin():
            self.verify(1)
            return False
        believed = logs(self.belief ** np.arange(1, 9)[None].repeat(self.batch, axis=0))
        masses = [self.policy.mass(believed[:, :1], 0)]
        while len(masses) < 8 and self.policy.expands(masses, self.batch, self.cost):
            level = len(masses)
            masses.append(self.policy.mass(believed[:, level : level + 1], level))
        levels = len(masses)
        time = self.level * ONE_MS
        self.policy.observe_draft(time, time * (levels - 1), levels - 1)
        scores = np.full((self.batch, 63), -np.inf)
        scores[:, :levels] = believed[:, :levels]
        size = self.policy.size(scores, levels, self.cost)
        holds = rng.random((self.batch, 63)) < self.truth
        is_accepted = (holds.cumprod(axis=1) * (scores > -np.inf))[:, : size - 1]
        self.policy.observe_outcome(scores[:, : size - 1], is_accepted, levels)
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


@pytest.mark.parametrize("batch", [1, 4])
def test_a_good_drafter_drafts_nearly_always(rng: np.random.Generator, batch: int) -> None:
    """In a batch no round ever verifies one row alone; the cost of one is still known."""
    world = World(MeasuredPolicy(), RoundCost(), batch=batch)
    assert world.share(400, rng) > 0.98


@pytest.mark.parametrize(
    ("belief", "truth", "level"),
    [(0.1, 0.1, 0.3), (0.5, 0.5, 2.0), (0.99, 0.0, 0.2), (0.99, 0.1, 0.3)],
)
def test_drafting_that_loses_stops_and_is_tried_more_and_more_rarely(
    rng: np.random.Generator, belief: float, truth: float, level: float
) -> None:
    """Unsure, dear, and two that are sure and wrong."""
    world = World(MeasuredPolicy(), RoundCost(), belief, truth, level)
    world.share(400, rng)
    assert world.share(2000, rng) < 0.05
    tries = [number for number in range(2000) if world.round(rng)]
    gaps = [after - before for before, after in pairwise(tries)]
    assert tries and max(gaps) == 129


@pytest.mark.parametrize(("belief", "truth"), [(0.05, 0.05), (0.95, 0.0), (0.3, 0.0)])
def test_it_comes_back_when_drafting_wins(
    rng: np.random.Generator, belief: float, truth: float
) -> None:
    world = World(MeasuredPolicy(), RoundCost(), belief, truth, level=0.3)
    assert world.share(1200, rng) < 0.25
    world.belief = world.truth = 0.95
    world.level = 0.05
    world.share(300, rng)  # two of the longest pauses
    assert world.share(400, rng) > 0.98


HOPELESS, SURE = np.full((1, 63), 1e-3), np.full((1, 63), 0.9)


def pause_after(policy: MeasuredPolicy, believed: np.ndarray, num_rounds: int) -> int:
    """Rounds without drafts behind so many with trees of these beliefs; none is among them."""
    for _ in range(num_rounds):
        assert policy.begin()
        policy.size(logs(believed), 1, measured())
    pause = 0
    while not policy.begin():
        pause += 1
    return pause


def test_the_first_pause_is_short_and_none_comes_before_something_is_lost() -> None:
    policy = MeasuredPolicy()
    lost = 1.0 - policy.best_size(logs(HOPELESS), 1, measured())[1]
    assert 0.1 < lost < 0.125  # of a round: what drafting is assumed to take
    assert pause_after(policy, HOPELESS, 4) == 0
    pauses = [pause_after(policy, HOPELESS, count) for count in (1, 5, 5, 5, 5, 5)]
    assert pauses == [8, 16, 32, 64, 128, 128]


def test_what_is_won_pays_for_what_is_lost() -> None:
    """A good tree among three in vain, again and again."""
    policy = MeasuredPolicy()
    for _ in range(20):
        assert pause_after(policy, HOPELESS, 3) == 0
        policy.size(logs(SURE), 1, measured())
        assert pause_after(policy, SURE, 1) == 0
    assert policy.gain() > 1.0


def test_a_text_that_runs_alone_is_judged_by_itself() -> None:
    policy = MeasuredPolicy()
    assert policy.gain() == math.inf
    assert pause_after(policy, HOPELESS, 5) == 8
    for _ in range(5):
        policy.size(logs(HOPELESS), 1, measured())
    assert policy.begin() is None and policy.gain() == 1.0
    policy.welcome(9)
    assert policy.gain() == math.inf
    assert pause_after(policy, HOPELESS, 5) == 32, "but no shorter a pause behind it"
    assert pause_after(policy, HOPELESS, 5) == 64
    policy.welcome(64)
    assert pause_after(policy, HOPELESS, 5) == 32, "and not the longest"


def test_short_texts_are_judged_together() -> None:
    """Of those that end before one could pause only some are drafted for."""
    policy, num_drafted = MeasuredPolicy(), 0
    for _ in range(100):
        policy.welcome(4)
        for _ in range(4):
            if policy.begin():
                policy.size(logs(HOPELESS), 1, measured())
                num_drafted += 1
    assert num_drafted < 40


@pytest.mark.parametrize("num_good", [10, 2])
def test_good_trees_that_come_and_go_are_not_missed_for_long(num_good: int) -> None:
    """What was won since the last pause keeps the next one short, however soon that comes."""
    policy = MeasuredPolicy()
    for _ in range(20):
        assert pause_after(policy, SURE, num_good) == 0
        assert pause_after(policy, HOPELESS, 5) == 8


def test_more_is_hoped_of_what_is_passed_over() -> None:
    policy = MeasuredPolicy()
    assert pause_after(policy, SURE, 20) == 0
    known = policy.gain()
    for _ in range(50):
        policy.pass_over()
    assert policy.gain() == pytest.approx(2.0 * known)
    assert pause_after(policy, SURE, 1) == 0
    assert policy.gain() == pytest.approx(known, rel=0.05), "it was tried"
    for _ in range(5):
        assert policy.begin()
        policy.size(logs(HOPELESS), 1, measured())
    for _ in range(8):
        assert policy.gain() == 1.0
        policy.pass_over()
    assert policy.gain() == math.inf and policy.begin(), "a pause went by meanwhile"


def test_a_text_of_another_kind_is_not_carried_by_the_one_before() -> None:
    policy = MeasuredPolicy()
    assert pause_after(policy, SURE, 40) == 0 and policy.gain() > 1.0
    assert pause_after(policy, HOPELESS, 5) == 8
