"""How deep to draft and how many nodes to verify: belief against measured time.

A drafter's path probabilities, summed over the nodes of a tree, are the drafted tokens it expects
to be accepted. Beliefs are scaled by how they turned out so far, times are measured as
rounds go by; a level or a node is added while it brings tokens faster than the round as a whole.
Measured times move trees, never tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specrt.draft.base import RoundCost

ENVELOPES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Tree sizes that are verified: few, because each is recorded once as a graph."""

_DECAY = 0.97
_ASSUMED_LEVEL = 0.12  # of a plain round, before anything is measured
_MIN_PAUSE, _MAX_PAUSE = 8, 128
_RECHECK = 256  # drafting rounds between two plain ones, which keep the measure of a plain round


@dataclass
class _Average:
    """A running mean that follows the present."""

    value: float | None = None

    def add(self, seen: float) -> None:
        # Outliers (a preempted thread) are capped so that one cannot turn drafting off.
        if self.value is None:
            self.value = seen
        else:
            self.value += (1.0 - _DECAY) * (min(seen, 2.0 * self.value) - self.value)


class EnvelopePolicy:
    """Chooses depth and size for a batch, round by round; shared by the sequences of a drafter."""

    def __init__(self) -> None:
        self._extend_ms, self._level_ms = _Average(), _Average()
        self._expected, self._accepted = 2.0, 2.0
        self._gain = _Average()
        self._pause = 0
        self._next_pause = _MIN_PAUSE
        self._rounds = 0

    def drafts(self, cost: RoundCost) -> bool:
        """Whether to draft this round at all."""
        self._rounds += 1
        if cost.one_ms is None or self._rounds % _RECHECK == 0:
            return False
        if self._pause > 0:
            self._pause -= 1
            return False
        return True

    def expands(self, masses: list[float], batch: int, cost: RoundCost) -> bool:
        """Whether another level will pay.

        Args:
            masses: probability that the path reaches each level so far (mean over sequences).
            batch: B.
            cost: of verifying.
        """
        scale = self._scale()
        reached = scale * masses[-1]
        fall = masses[-1] / masses[-2] if len(masses) > 1 else masses[-1]
        gain = batch * reached * min(1.0, fall)
        level = self._relative(self._level_ms, cost)
        price = self._relative(self._extend_ms, cost) + (len(masses) - 1) * level
        price += cost.relative(batch * (1 + 2 * len(masses)))
        rate = batch * (1.0 + scale * sum(masses)) / price
        # A level also brings rows to verify: one or two a sequence, as far as it is kept.
        added = level + cost.relative(1 + batch) - 1.0
        return gain > rate * added

    def size(self, probs: np.ndarray, num_levels: int, cost: RoundCost) -> int:
        """The envelope to verify.

        Args:
            probs: ``[B, N - 1]`` path probabilities of the drafted nodes, best first; 0 is padding.
            num_levels: levels that were drafted, the root's children included.
            cost: of verifying.
        """
        batch, most = probs.shape[0], probs.shape[1] + 1
        expected = self._scale() * np.concatenate([[0.0], np.cumsum(probs.sum(axis=0))])
        sizes = [size for size in ENVELOPES if size < most] + [most]
        drafting = self._drafting(num_levels, cost)

        def rate(size: int) -> float:
            tokens = batch + float(expected[size - 1])
            return float(tokens / (drafting + cost.relative(batch * size)))

        best: int = max(sizes, key=rate)
        self._judge(rate(best) * cost.relative(batch) / batch)
        return best

    def observe_draft(self, extend_ms: float, levels_ms: float, num_expanded: int) -> None:
        """Times of one proposal whose steps were all replayed."""
        self._extend_ms.add(extend_ms)
        if num_expanded:
            self._level_ms.add(levels_ms / num_expanded)

    def observe_outcome(self, expected: float, accepted: int) -> None:
        """What a tree was believed to bring (unscaled), and what it brought, over the batch."""
        self._expected = _DECAY * self._expected + expected
        self._accepted = _DECAY * self._accepted + accepted

    def _scale(self) -> float:
        return min(1.5, max(0.3, self._accepted / max(self._expected, 1e-6)))

    def _relative(self, average: _Average, cost: RoundCost) -> float:
        if average.value is None or cost.one_ms is None:
            return _ASSUMED_LEVEL
        return average.value / cost.one_ms

    def _drafting(self, num_levels: int, cost: RoundCost) -> float:
        level = self._relative(self._level_ms, cost)
        return self._relative(self._extend_ms, cost) + (num_levels - 1) * level

    def _judge(self, gain: float) -> None:
        """Pause where drafting loses against plain decoding, longer each time it still does."""
        self._gain.add(gain)
        assert self._gain.value is not None
        if self._gain.value >= 1.0:
            self._next_pause = _MIN_PAUSE
        else:
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, _MAX_PAUSE)
