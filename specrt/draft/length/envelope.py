"""What is believed of trees whose scores the host does not see: what came of earlier ones.

On a GPU the host does not wait for a tree's probabilities, so its sizes are decided before it is
drafted. All it has are reports of earlier rounds: how often the path went on into a level, and how
often the node of a rank was on it.
"""

from __future__ import annotations

import numpy as np

GPU_ENVELOPES = (1, 8, 16, 32, 64)
"""Tree sizes that are verified on a GPU, where further rows cost next to nothing."""

_MAX_LEVELS = 32  # of a tree within them


class RankBelief:
    """The :class:`~specrt.draft.length.measured.Belief` of trees whose nodes come best first.

    Rates of levels and ranks are running shares. What was not seen of late is taken to be as good
    as what comes before it, which is likely too much: so deeper and larger trees are tried, and
    tried again now and then.
    """

    _MEMORY = 0.99  # weight of the past, a round
    _PRIOR = 1.0  # sequences that the rates before count for
    _FIRST = 0.7  # of the first rank and the first level, before anything is seen

    def __init__(self) -> None:
        # How often accepted, and how often there was a choice.
        self._ranks = np.zeros((2, GPU_ENVELOPES[-1]))
        self._levels = np.zeros((2, _MAX_LEVELS))
        self._learn()

    def reach(self, scores: np.ndarray, level: int) -> float:
        """Probability that the path goes on into ``level`` (0: the root's children)."""
        return float(self._reached[level])

    def accepted(self, scores: np.ndarray, num_levels: int) -> np.ndarray:
        """``[N - 1]``: in how many of B sequences each node of ``[B, N - 1]`` will be accepted."""
        batch, count = scores.shape
        # No path is longer than there are levels.
        total = np.minimum(self._rates[:count].cumsum(), num_levels)
        added: np.ndarray = batch * np.diff(total, prepend=0.0)
        return added

    def observe(self, scores: np.ndarray, is_accepted: np.ndarray, num_levels: int) -> None:
        """Take one round's verified nodes ``[B, N - 1]``."""
        batch, count = is_accepted.shape
        if count == 0:  # a root alone says nothing
            return
        self._ranks *= self._MEMORY
        self._levels *= self._MEMORY
        self._ranks[0, :count] += is_accepted.sum(axis=0)
        self._ranks[1, :count] += batch
        lengths = is_accepted.sum(axis=1)[:, None]
        depths = np.arange(1, num_levels + 1)
        self._levels[0, :num_levels] += (lengths >= depths).sum(axis=0)
        self._levels[1, :num_levels] += (lengths >= depths - 1).sum(axis=0)
        self._learn()

    def forgive(self) -> None:
        """Go halfway back to the beginning: without trees to verify nothing restores trust."""
        self._ranks *= 0.5
        self._levels *= 0.5
        self._learn()

    def _learn(self) -> None:
        self._rates = self._shares(self._ranks)
        self._reached = self._shares(self._levels).cumprod()

    def _shares(self, counts: np.ndarray) -> np.ndarray:
        """Of each rank or level; expected of one is what half of those before it have come to."""
        sums = [0.0]  # of the first shares
        for index, (accepted, seen) in enumerate(counts.T.tolist()):
            half = index // 2
            before = (sums[index] - sums[half]) / (index - half) if index else self._FIRST
            sums.append(sums[index] + (self._PRIOR * before + accepted) / (self._PRIOR + seen))
        return np.diff(sums)
