"""Draft control for trees: levels are drafted as a chain's tokens would be.

What a chain's controller sees of a token, a tree's sees of a level: the chance that the accepted
path goes on into it, given that it came so far. The batch counts as one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from specrt.draft.length.control import ControlOptions, ControlRound, DraftControl
from specrt.draft.length.costs import DraftCosts, RoundCost
from specrt.draft.length.measured import MeasuredPolicy, TreeRound
from specrt.types import SequenceState

NODES_A_LEVEL = 2
"""That are verified, where nobody weighs their time."""
_UNMEASURED = DraftCosts(fixed=0.0, step=0.12, lower=0.0, verify=1.0, row=0.16)


class ControlledPolicy:
    """A ``TreePolicy`` that asks a draft controller how many levels to draft.

    How likely a path goes on is what :class:`MeasuredPolicy` believes, and ``cost-aware`` leaves it
    the number of nodes too; the other rules verify two nodes a level.

    Args:
        options: the rule; ``max_draft`` counts levels.
        seed: of its draws.
        measured: whose belief; None: one by corrected path probabilities.
    """

    def __init__(
        self, options: ControlOptions, seed: int = 0, measured: MeasuredPolicy | None = None
    ) -> None:
        self._policy = measured or MeasuredPolicy()
        self._control = DraftControl(options)
        # The batch as one sequence, which has no end.
        self._batch = SequenceState([], 0, 2**31, seed, 0.0)
        self._control.start(self._batch)
        self._free: list[ControlRound] = []
        self._num_rounds = 0
        self._costs = _UNMEASURED

    def begin(self) -> TreeRound | None:
        """A round that drafts, or None."""
        self._num_rounds = (self._num_rounds + 1) % 2**31
        control = self._free.pop() if self._free else self._control.new_round(1)
        control.stage(self._control, [self._batch], self._costs, [self._num_rounds])
        control.decide(0)
        if control.is_open[0]:
            return _ControlledRound(self, control)
        self.learn(control, 0)  # no outcome will be reported
        return None

    def observe_draft(self, extend_ms: float, levels_ms: float, num_expanded: int) -> None:
        """Times of one proposal, all of whose steps had run before."""
        self._policy.observe_draft(extend_ms, levels_ms, num_expanded)

    # --- for its rounds -----------------------------------------------------------------------

    @property
    def belief(self) -> MeasuredPolicy:
        """Who knows how likely paths are."""
        return self._policy

    def price(self, batch: int, cost: RoundCost) -> DraftCosts:
        """What drafting costs by now, in rounds of one row.

        The first level comes with the accepted pairs, before any step.
        """
        level = self._policy.level_cost(cost)
        self._costs = DraftCosts(
            fixed=max(0.0, self._policy.extend_cost(cost) - level),
            step=level,
            lower=0.0,
            verify=cost.relative(batch),
            row=cost.relative(1 + NODES_A_LEVEL * batch) - 1.0,
        )
        return self._costs

    def size(self, scores: np.ndarray, num_levels: int, cost: RoundCost) -> int:
        """How many nodes to verify: an envelope."""
        size = self._size(scores, num_levels, cost)
        self._policy.take_gain(size, scores, num_levels, cost)
        return size

    def learn(self, control: ControlRound, accept_length: int) -> None:
        """A round is over, and its buffers are free."""
        control.update(self._control, [self._batch], [accept_length])
        self._free.append(control)

    def _size(self, scores: np.ndarray, num_levels: int, cost: RoundCost) -> int:
        most = scores.shape[1] + 1
        if self._control.options.kind != "cost-aware":
            return self._envelope(num_levels, most)
        size, _ = self._policy.best_size(scores, num_levels, cost)
        if self._control.posterior(self._batch).idle > 0:
            size = max(size, self._envelope(1, most))  # drafted to learn whether it pays again
        return size

    def _envelope(self, num_levels: int, most: int) -> int:
        sizes = (*self._policy.envelopes, most)
        return min(most, next(n for n in sizes if n > NODES_A_LEVEL * num_levels))


class _ControlledRound:
    """What one proposal was decided by, until its outcome is known."""

    def __init__(self, policy: ControlledPolicy, control: ControlRound) -> None:
        self._policy = policy
        self._control = control
        self._score = torch.zeros(1)

    def mass(self, scores: np.ndarray, level: int) -> float:
        """Probability that the path reaches a frontier ``[B, K]``, mean over sequences."""
        return self._policy.belief.mass(scores, level)

    def expands(self, masses: Sequence[float], batch: int, cost: RoundCost) -> bool:
        """Whether the controller wants another level."""
        above, last = (masses[-2] if len(masses) > 1 else 1.0), masses[-1]
        is_reached = last > 0.0 and above > 0.0
        self._score[0] = min(0.0, math.log(last / above)) if is_reached else math.nan
        self._control.price(self._policy.price(batch, cost))
        self._control.decide(len(masses), self._score)
        return bool(self._control.is_open[0])

    def size(self, scores: np.ndarray, num_levels: int, cost: RoundCost) -> int:
        """How many nodes to verify: an envelope."""
        size = self._policy.size(scores, num_levels, cost)
        # What is verified is for the nodes to say, not for the last level's fate in a chain.
        judged = int(np.isfinite(self._control.confidence[0]).sum())
        self._control.length[0] = judged if size > 1 else 0
        return size

    def observe_outcome(self, scores: np.ndarray, is_accepted: np.ndarray, num_levels: int) -> None:
        """Which nodes ``[B, N - 1]`` of the verified tree were on the accepted path."""
        self._policy.belief.observe_outcome(scores, is_accepted, num_levels)
        self._policy.learn(self._control, round(float(is_accepted.sum(axis=1).mean())))
