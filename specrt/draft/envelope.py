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
_PRIOR = 2.0  # tokens that count as expected and accepted before anything is
_ASSUMED_LEVEL = 0.12  # of a plain round, before anything is measured
_MIN_PAUSE, _MAX_PAUSE = 8, 128
_PROOF = 16  # rounds that win since a pause before the next one is short again
_RECHECK = 256  # drafting rounds between two plain ones, which keep the measure of a plain round


@dataclass
class _Average:
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


class EnvelopePolicy:
    """Chooses depth and size for a batch, round by round; shared by the sequences of a drafter."""

    def __init__(self) -> None:
        self._extend_ms, self._level_ms = _Average(), _Average()
        self._expected, self._accepted = _PRIOR, _PRIOR
        self._gain = _Average()
        self._pause = 0
        self._next_pause = _MIN_PAUSE
        self._since_plain = 0

    def drafts(self, cost: RoundCost) -> bool:
        """Whether to draft this round at all."""
        is_plain = cost.one_ms is None or self._pause > 0 or self._since_plain >= _RECHECK
        self._pause = max(0, self._pause - 1)
        self._since_plain = 0 if is_plain else self._since_plain + 1
        return not is_plain

    def expands(self, masses: list[float], batch: int, cost: RoundCost) -> bool:
        """Whether another level will pay.

        Args:
            masses: probability that the path reaches each level so far (mean over sequences).
            batch: B.
            cost: of verifying.
        """
        above, last = (masses[-2] if len(masses) > 1 else 1.0), masses[-1]
        if not (last > 0.0 and above > 0.0):  # nothing is reached, or it is NaN
            return False
        scale = self._scale()
        gain = batch * scale * last * min(1.0, last / above)
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
            probs: ``[B, N - 1]`` path probabilities of the drafted nodes, best first; 0 is padding,
                and NaN promises nothing.
            num_levels: levels that were drafted, the root's children included.
            cost: of verifying.
        """
        batch, most = probs.shape[0], probs.shape[1] + 1
        gains = np.cumsum(np.nan_to_num(probs).sum(axis=0))
        expected = self._scale() * np.concatenate([[0.0], gains])
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
        if expected > 0.0:  # a root alone says nothing of beliefs, nor does NaN
            self._expected = _DECAY * self._expected + expected
            self._accepted = _DECAY * self._accepted + accepted

    def _scale(self) -> float:
        # No floor: a drafter that is sure of itself and always wrong must look hopeless.
        return min(1.5, self._accepted / max(self._expected, 1e-6))

    def _relative(self, average: _Average, cost: RoundCost) -> float:
        if average.value is None or cost.one_ms is None:
            return _ASSUMED_LEVEL
        return average.value / cost.one_ms

    def _drafting(self, num_levels: int, cost: RoundCost) -> float:
        level = self._relative(self._level_ms, cost)
        return self._relative(self._extend_ms, cost) + (num_levels - 1) * level

    def _judge(self, gain: float) -> None:
        """Pause where drafting loses against plain decoding, longer each time it still does."""
        if self._gain.add(gain) >= 1.0:
            if self._gain.count >= _PROOF:
                self._next_pause = _MIN_PAUSE
            return
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, _MAX_PAUSE)
        # What comes after the pause may be another text: it is judged by itself, and beliefs regain
        # trust, since without a tree to verify nothing could restore it.
        self._gain = _Average()
        self._expected = 0.5 * (self._expected + _PRIOR)
        self._accepted = 0.5 * (self._accepted + _PRIOR)
