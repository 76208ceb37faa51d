"""Draft control for trees: levels are drafted as a chain's tokens would be.

What a chain's controller sees of a token, a tree's sees of a level: the chance that the accepted
path goes on into it, given that it came so far. The batch counts as one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from specrt.draft.length.control import ControlOptions, DraftControl
from specrt.draft.length.costs import DraftCosts, RoundCost
from specrt.draft.length.measured import ENVELOPES, MeasuredPolicy
from specrt.types import SequenceState

_NODES_A_LEVEL = 2
_UNMEASURED = DraftCosts(fixed=0.0, step=0.12, lower=0.0, verify=1.0, row=0.16)


class ControlledPolicy:
    """A ``TreePolicy`` that asks a draft controller how many levels to draft.

    Path probabilities are corrected as :class:`MeasuredPolicy` does, and ``cost-aware`` leaves it
    the number of nodes too; the other rules verify two nodes a level.

    Args:
        options: the rule; ``max_draft`` counts levels.
        seed: of its draws.
    """

    def __init__(self, options: ControlOptions, seed: int = 0) -> None:
        self._policy = MeasuredPolicy()
        self._control = DraftControl(options)
        # The batch as one sequence, which has no end.
        self._batch = SequenceState([], 0, 2**31, seed, 0.0)
        self._control.start(self._batch)
        self._round = self._control.new_round(1)
        self._score = torch.zeros(1)
        self._num_rounds = 0
        self._costs = _UNMEASURED

    def drafts(self) -> bool:
        """Whether to draft this round at all."""
        self._num_rounds = (self._num_rounds + 1) % 2**31
        self._round.stage(self._control, [self._batch], self._costs, [self._num_rounds])
        self._round.decide(0)
        is_open = bool(self._round.is_open[0])
        if not is_open:  # no outcome will be reported
            self._learn(0)
        return is_open

    def mass(self, scores: np.ndarray) -> float:
        """Probability that the path reaches a frontier ``[B, K]``, mean over sequences."""
        return self._policy.mass(scores)

    def expands(self, masses: Sequence[float], batch: int, cost: RoundCost) -> bool:
        """Whether the controller wants another level."""
        above, last = (masses[-2] if len(masses) > 1 else 1.0), masses[-1]
        is_reached = last > 0.0 and above > 0.0
        self._score[0] = min(0.0, math.log(last / above)) if is_reached else math.nan
        self._costs = self._costs_of(batch, cost)
        self._round.price(self._costs)
        self._round.decide(len(masses), self._score)
        return bool(self._round.is_open[0])

    def size(self, scores: np.ndarray, num_levels: int, cost: RoundCost) -> int:
        """How many nodes to verify: an envelope."""
        most = scores.shape[1] + 1
        if self._control.options.kind == "cost-aware":
            size, _ = self._policy.best_size(scores, num_levels, cost)
            if self._control.posterior(self._batch).idle > 0:
                size = max(size, _envelope(1, most))  # drafted to learn whether it pays again
        else:
            size = _envelope(num_levels, most)
        # What is verified is for the nodes to say, not for the last level's fate in a chain.
        judged = int(np.isfinite(self._round.confidence[0]).sum())
        self._round.length[0] = judged if size > 1 else 0
        return size

    def observe_draft(self, extend_ms: float, levels_ms: float, num_expanded: int) -> None:
        """Times of one proposal whose steps were all replayed."""
        self._policy.observe_draft(extend_ms, levels_ms, num_expanded)

    def observe_outcome(self, scores: np.ndarray, is_accepted: np.ndarray) -> None:
        """Which nodes ``[B, N - 1]`` of a verified tree were on the accepted path."""
        self._policy.observe_outcome(scores, is_accepted)
        self._learn(round(float(is_accepted.sum(axis=1).mean())))

    def _learn(self, accept_length: int) -> None:
        self._round.update(self._control, [self._batch], [accept_length])

    def _costs_of(self, batch: int, cost: RoundCost) -> DraftCosts:
        """In rounds of one row. The first level comes with the accepted pairs, before any step."""
        level = self._policy.level_cost(cost)
        return DraftCosts(
            fixed=max(0.0, self._policy.extend_cost(cost) - level),
            step=level,
            lower=0.0,
            verify=cost.relative(batch),
            row=cost.relative(1 + _NODES_A_LEVEL * batch) - 1.0,
        )


def _envelope(num_levels: int, most: int) -> int:
    return min(most, next(n for n in (*ENVELOPES, most) if n > _NODES_A_LEVEL * num_levels))
