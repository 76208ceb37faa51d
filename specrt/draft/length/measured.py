"""How deep to draft and how many nodes to verify: belief against measured time.

What is believed of a tree's nodes, summed over them, are the drafted tokens that are expected to be
accepted. Where the host sees a drafter's path probabilities it believes these, corrected by how
they turned out so far (:class:`Calibration`); where it does not, what came of earlier trees
(:mod:`~specrt.draft.length.envelope`). Times are measured as rounds go by; a level or a node is
added while it brings tokens faster than the round as a whole. Measured times move trees, never
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specrt.draft.length.costs import RoundCost

ENVELOPES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Tree sizes that are verified: few, because each is captured once as a graph."""

_DECAY = 0.97
_ASSUMED_LEVEL = 0.12  # of a plain round, before anything is measured
_MIN_PAUSE, _MAX_PAUSE = 8, 128
_STAKE = 0.5  # plain rounds' time that drafting may lose before it pauses: a tree is not the next
_NEXT_TEXT = 32  # rounds, at most, of the first pause in a text of its own
_DOUBT = 0.02  # by which more is hoped of trees for each round that was another drafter's


@dataclass
class RunningMean:
    """A running mean that follows the present; the plain mean of the first values."""

    value: float | None = None
    count: int = 0

    def add(self, seen: float) -> float:
        """Take one more value; the mean."""
        self.count += 1
        if self.value is None:
            self.value = seen
        else:
            # Outliers (a preempted thread) are capped so that one cannot turn drafting off.
            capped = min(seen, 2.0 * self.value)
            self.value += max(1.0 / self.count, 1.0 - _DECAY) * (capped - self.value)
        return self.value


class Belief(Protocol):
    """What is expected of nodes, and learned of what came of them.

    Scores are log-probabilities of nodes' paths; NaN where the host does not see them.
    """

    def reach(self, scores: np.ndarray, level: int) -> float:
        """Probability that the path goes on into the frontier ``[B, K]`` that ``level`` made (0:
        the root's children), mean over sequences."""

    def accepted(self, scores: np.ndarray, num_levels: int) -> np.ndarray:
        """``[N - 1]``: of each node ``[B, N - 1]`` of a tree of so many levels, best first, in how
        many sequences it will be accepted."""

    def observe(self, scores: np.ndarray, is_accepted: np.ndarray, num_levels: int) -> None:
        """Take one round's verified nodes ``[B, N - 1]``."""

    def forgive(self) -> None:
        """Go halfway back to the beginning: without trees to verify nothing restores trust."""


class Calibration:
    """How often nodes of a believed probability were on the accepted path.

    A drafter's law is the target's only roughly, and a greedy target takes its likeliest token more
    often than the law says. Each class of belief has its own factor, which begins at 1.
    """

    _EDGES = np.array([-6.5, -5.0, -4.0, -3.0, -2.3, -1.7, -1.2, -0.8, -0.5, -0.3, -0.15, -0.05])
    _MEMORY = 0.99  # weight of the past, a round
    _PRIOR = 1.0  # accepted nodes that 1 counts for at first

    def __init__(self) -> None:
        self._believed = np.full(len(self._EDGES) + 1, self._PRIOR)
        self._accepted = self._believed.copy()

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Corrected probabilities of nodes whose paths have these log-probabilities."""
        factors = self._accepted / np.maximum(self._believed, 1e-6)
        known: np.ndarray = factors[np.digitize(scores, self._EDGES)]
        corrected: np.ndarray = np.minimum(1.0, _probability(scores) * known)
        return corrected

    def reach(self, scores: np.ndarray, level: int) -> float:
        """As :class:`Belief` says; a path goes on into one of them."""
        return min(1.0, float(self(scores).sum(axis=1).mean()))

    def accepted(self, scores: np.ndarray, num_levels: int) -> np.ndarray:
        """As :class:`Belief` says."""
        summed: np.ndarray = self(scores).sum(axis=0)
        return summed

    def observe(self, scores: np.ndarray, is_accepted: np.ndarray, num_levels: int) -> None:
        """Take one round's verified nodes."""
        if scores.size == 0:  # a root alone says nothing of beliefs
            return
        kinds, size = np.digitize(scores, self._EDGES).ravel(), len(self._believed)
        self._believed *= self._MEMORY
        self._accepted *= self._MEMORY
        self._believed += np.bincount(kinds, _probability(scores).ravel(), size)
        self._accepted += np.bincount(kinds, is_accepted.ravel(), size)

    def forgive(self) -> None:
        """Go halfway back to the beginning: without trees to verify nothing restores trust."""
        self._believed = 0.5 * (self._believed + self._PRIOR)
        self._accepted = 0.5 * (self._accepted + self._PRIOR)


def _probability(scores: np.ndarray) -> np.ndarray:
    """0 for what is no score: padding, or NaN."""
    return np.exp(np.where(np.isnan(scores), -np.inf, scores))


class TreeRound(Protocol):
    """Chooses depth and size of one proposal: ``expands`` is asked after each level, then ``size``;
    ``observe_outcome`` is told what came of it, maybe after later rounds have begun. Scores are NaN
    where the host does not see them."""

    def mass(self, scores: np.ndarray, level: int) -> float:
        """Probability that the path reaches the frontier ``[B, K]`` that ``level`` made (0: the
        root's children), mean over sequences."""

    def expands(self, masses: list[float], batch: int, cost: RoundCost) -> bool:
        """Whether to draft another level; asked of the last possible one too.

        Args:
            masses: :meth:`mass` of each level so far.
            batch: B.
            cost: of verifying.
        """

    def size(self, scores: np.ndarray, num_levels: int, cost: RoundCost) -> int:
        """How many nodes to verify: an envelope.

        Args:
            scores: ``[B, N - 1]`` log-probabilities of the drafted nodes' paths, best first.
            num_levels: levels that were drafted, the root's children included.
            cost: of verifying.
        """

    def observe_outcome(self, scores: np.ndarray, is_accepted: np.ndarray, num_levels: int) -> None:
        """Which nodes ``[B, N - 1]`` of the verified tree, best first, were on the accepted path.

        Args:
            scores: theirs.
            is_accepted: 1 or 0.
            num_levels: that were drafted.
        """


class TreePolicy(Protocol):
    """What the sequences of a drafter share, from round to round."""

    def begin(self) -> TreeRound | None:
        """A round that drafts; None: the root alone."""

    def observe_draft(self, extend_ms: float, levels_ms: float, num_expanded: int) -> None:
        """Times of one proposal, all of whose steps had run before."""


class MeasuredPolicy:
    """The :class:`TreePolicy` by belief and measured time; all of its rounds are itself.

    Args:
        belief: None: path probabilities, corrected.
        envelopes: tree sizes that are verified, beside the largest there may be.
    """

    def __init__(
        self, belief: Belief | None = None, envelopes: tuple[int, ...] = ENVELOPES
    ) -> None:
        self.envelopes = envelopes
        self._belief: Belief = belief or Calibration()
        self._extend_ms, self._level_ms = RunningMean(), RunningMean()
        self._gain, self._lost = RunningMean(), 0.0
        self._won = 0.0  # plain rounds' time since the last pause, what was lost taken off
        self._pause = 0
        self._next_pause = _MIN_PAUSE
        self._num_passed = 0

    def begin(self) -> MeasuredPolicy | None:
        """A round that drafts; None while drafting pauses."""
        is_paused = self._pause > 0
        self._pause = max(0, self._pause - 1)
        return None if is_paused else self

    def welcome(self, num_left: int) -> None:
        """A sequence begins that runs alone: its text is judged by itself, so that a pause others
        brought about ends, and the next is not as long as the longest.

        Args:
            num_left: tokens it may have. Where these are fewer than a pause's rounds, many such
                texts would each lose what one may: they are judged together.
        """
        if num_left > _MIN_PAUSE:
            self._pause, self._next_pause = 0, min(self._next_pause, _NEXT_TEXT)
            self._gain, self._lost = RunningMean(), 0.0

    def gain(self) -> float:
        """What a round's trees are hoped to bring over plain decoding; 1 while drafting pauses.

        What rounds of late brought, and the more, the longer ago that was (:meth:`pass_over`):
        what is never tried is never found to be better. Infinite where nothing is known.
        """
        if self._pause > 0:
            return 1.0
        known = math.inf if self._gain.value is None else self._gain.value
        return known * (1.0 + _DOUBT * self._num_passed)

    def pass_over(self) -> None:
        """A round is another drafter's: a pause goes on meanwhile."""
        if self._pause > 0:
            self._pause -= 1
        else:
            self._num_passed += 1

    def mass(self, scores: np.ndarray, level: int) -> float:
        """Probability that the path reaches a frontier ``[B, K]``, mean over sequences."""
        return self._belief.reach(scores, level)

    def expands(self, masses: list[float], batch: int, cost: RoundCost) -> bool:
        """Whether another level will pay."""
        above, last = (masses[-2] if len(masses) > 1 else 1.0), masses[-1]
        if not (last > 0.0 and above > 0.0):  # nothing is reached
            return False
        gain = batch * last * min(1.0, last / above)
        level = self.level_cost(cost)
        # A level brings a row or two a sequence to verify.
        price = self._drafting(len(masses), cost) + cost.relative(batch * (1 + 2 * len(masses)))
        added = level + cost.relative(1 + 2 * batch) - 1.0
        return gain * price > added * batch * (1.0 + sum(masses))

    def size(self, scores: np.ndarray, num_levels: int, cost: RoundCost) -> int:
        """The envelope of the highest rate; where it still loses, drafting pauses."""
        best, gain = self.best_size(scores, num_levels, cost)
        self._judge(gain)
        return best

    def best_size(self, scores: np.ndarray, num_levels: int, cost: RoundCost) -> tuple[int, float]:
        """The envelope of the highest rate, and that rate over plain decoding's."""
        most = scores.shape[1] + 1
        sizes = [size for size in self.envelopes if size < most] + [most]
        rate = self._rate(scores, num_levels, cost)
        best: int = max(sizes, key=rate)
        return best, rate(best)

    def take_gain(self, size: int, scores: np.ndarray, num_levels: int, cost: RoundCost) -> None:
        """A tree's size was chosen elsewhere: note what is expected of it; nothing is judged."""
        self._note(self._rate(scores, num_levels, cost)(size))

    def observe_draft(self, extend_ms: float, levels_ms: float, num_expanded: int) -> None:
        """Times of one proposal, all of whose steps had run before."""
        self._extend_ms.add(extend_ms)
        if num_expanded:
            self._level_ms.add(levels_ms / num_expanded)

    def observe_outcome(self, scores: np.ndarray, is_accepted: np.ndarray, num_levels: int) -> None:
        """Which nodes ``[B, N - 1]`` of a verified tree were on the accepted path."""
        self._belief.observe(scores, is_accepted, num_levels)

    def extend_cost(self, cost: RoundCost) -> float:
        """Time of the root's children, in rounds of one row."""
        return self._relative(self._extend_ms, cost)

    def level_cost(self, cost: RoundCost) -> float:
        """Time of a level below them, in rounds of one row."""
        return self._relative(self._level_ms, cost)

    def _relative(self, average: RunningMean, cost: RoundCost) -> float:
        if average.value is None or cost.one_ms is None:
            return _ASSUMED_LEVEL
        return average.value / cost.one_ms

    def _drafting(self, num_levels: int, cost: RoundCost) -> float:
        return self.extend_cost(cost) + (num_levels - 1) * self.level_cost(cost)

    def _rate(self, scores: np.ndarray, num_levels: int, cost: RoundCost) -> Callable[[int], float]:
        """Tokens by time of a tree's first nodes, so many, over plain decoding's."""
        batch: int = scores.shape[0]
        expected = np.concatenate([[0.0], self._belief.accepted(scores, num_levels).cumsum()])
        drafting, plain = self._drafting(num_levels, cost), cost.relative(batch) / batch

        def rate(size: int) -> float:
            tokens = batch + float(expected[size - 1])
            return float(tokens / (drafting + cost.relative(batch * size))) * plain

        return rate

    def _note(self, gain: float) -> None:
        self._gain.add(gain)
        self._num_passed = 0

    def _judge(self, gain: float) -> None:
        """Pause where drafting loses against plain decoding, longer each time it has only lost
        since the pause before."""
        self._note(gain)
        self._won += gain - 1.0
        self._lost = max(0.0, self._lost + 1.0 - gain)
        if self._lost < _STAKE:
            return
        if self._won >= 0.0:  # good trees come and go: long pauses would miss them
            self._next_pause = _MIN_PAUSE
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, _MAX_PAUSE)
        # What comes after the pause may be another text: it is judged by itself.
        self._gain, self._lost, self._won = RunningMean(), 0.0, 0.0
        self._belief.forgive()
