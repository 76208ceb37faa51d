"""Prompt lookup where the histories are: a round of it is launches alone.

A tree is found by ``ops.prompt_lookup``, which reads the history itself: what was accepted a moment
ago is looked up before the host has heard of it. So the host cannot weigh a match before it is
verified, and need not: rows that go on a GPU together cost what the largest tree of the batch does,
whatever a sequence's own match is worth. All that is chosen is the width of the trees, one for the
batch, by what earlier widths have brought.

The trees of one history are nested, a smaller one being the beginning of a larger one, so a node
has the same rank in each. How often the node of a rank was accepted, over all sequences, is what a
round's report tells (``path``): a sequence that found nothing has accepted no rank. The length of a
match and that of its continuations, which records on the CPU are kept by, are not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specrt import ops
from specrt.device import Device
from specrt.draft.base import BatchTables, Budget, DraftParams, RoundPlan, StageTimes
from specrt.draft.length.costs import RoundCost
from specrt.draft.length.envelope import GPU_ENVELOPES, RankBelief
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.reuse import Recent
from specrt.types import AcceptResult, DraftTree, Proposal, RoundReport, SequenceState

_MAX_PLANS = 256  # whose buffers are kept
_MAX_LEVELS = 32  # that a RankBelief tells apart
_REST = 16  # rounds without a look where none has paid


@dataclass(frozen=True)
class LookupShape:
    """How B trees are looked up."""

    batch: int
    num_nodes: int
    depth: int
    num_continuations: int
    is_measured: bool
    """Whether the number of nodes was chosen by what came of earlier ones."""


@dataclass(frozen=True, eq=False)
class PlacedLookup:
    """A shape and its buffers: equal to itself alone, as addresses are. A captured round has it in
    its plan, and so keeps the buffers."""

    shape: LookupShape
    proposal: Proposal
    match_len: torch.Tensor
    longest: torch.Tensor


class WidthPolicy:
    """Which of :data:`GPU_ENVELOPES` brings the most tokens for a round's time."""

    def __init__(self) -> None:
        self._belief = RankBelief()
        self._rest = 0

    def choose(self, batch: int, most: int, depth: int, cost: RoundCost) -> int:
        """Nodes of the next trees; 1 is not to draft. To look up is taken to cost no time.

        Args:
            batch: B sequences.
            most: nodes a tree can have.
            depth: tokens of a continuation, at most.
            cost: of verifying rows.
        """
        if self._rest > 0 or most == 1:
            self._rest = max(0, self._rest - 1)
            return 1
        unseen = np.full((batch, most - 1), np.nan)
        expected = np.cumsum([batch, *self._belief.accepted(unseen, min(depth, _MAX_LEVELS))])
        sizes = [size for size in GPU_ENVELOPES if size < most] + [most]
        best = max(sizes, key=lambda size: float(expected[size - 1]) / cost.relative(batch * size))
        if best == 1:
            self._rest = _REST
            self._belief.forgive()
        return best

    def observe(self, is_accepted: np.ndarray, depth: int) -> None:
        """Take which drafted nodes ``[B, N - 1]`` of a round were accepted."""
        unseen = np.full(is_accepted.shape, np.nan)
        self._belief.observe(unseen, is_accepted, min(depth, _MAX_LEVELS))


class DevicePromptLookupDrafter(PromptLookupDrafter):
    """As :class:`PromptLookupDrafter`, whose methods serve where a round is not launched; a
    :class:`~specrt.draft.base.LaunchedDrafter`.

    With :class:`DraftParams` sizes are fixed: as many nodes as they allow, and nothing is measured.
    Near the end of an output trees get shallower on the device.

    Args:
        device: the target's, a GPU.
        max_ngram: longest suffix looked up.
        min_ngram: shortest suffix looked up.
        max_depth: longest continuation proposed.
        num_continuations: how many earlier occurrences may become branches.
    """

    def __init__(
        self,
        device: Device,
        max_ngram: int = 4,
        min_ngram: int = 1,
        max_depth: int = 15,
        num_continuations: int = 3,
    ) -> None:
        super().__init__(max_ngram, min_ngram, max_depth, num_continuations)
        self._device = device
        self._policy = WidthPolicy()
        self._plans: Recent[LookupShape, PlacedLookup] = Recent(_MAX_PLANS)

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan:
        """Choose the next trees' width, and have buffers for it."""
        largest, is_measured = self._largest(budget), budget.params == DraftParams()
        size = min(largest.num_nodes, 1 + largest.depth * largest.num_continuations)
        if is_measured:
            most = min(size, GPU_ENVELOPES[-1])
            size = self._policy.choose(len(states), most, largest.depth, budget.cost)
        shape = LookupShape(
            len(states), size, largest.depth, largest.num_continuations, is_measured
        )
        placed = self._plans.get(shape) or self._plans.put(shape, self._made(shape))
        return RoundPlan(size, placed)

    def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
        """Look the batch's trees up; a root alone needs no launch."""
        placed = _placed(plan)
        shape, proposal = placed.shape, placed.proposal
        if shape.num_nodes > 1:
            ops.prompt_lookup(
                tables.history,
                tables.history_len,
                tables.max_len,
                self._max_ngram,
                self._min_ngram,
                shape.num_continuations,
                shape.depth,
                proposal.draft_tokens,
                proposal.parents,
                proposal.num_nodes,
                placed.match_len,
                placed.longest,
            )
        return proposal

    def launch_observe(
        self,
        plan: RoundPlan,
        tables: BatchTables,
        tree: DraftTree,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """The history is all that is kept."""

    def told(
        self,
        states: Sequence[SequenceState],
        plan: RoundPlan,
        report: RoundReport,
        times: StageTimes,
    ) -> None:
        """Learn which ranks were right, of sequences that went on and had room for one."""
        shape = _placed(plan).shape
        rows = [
            row
            for row, state in enumerate(states)
            if state.num_left > 1 and report.num_taken[row] > 0
        ]
        if shape.is_measured and rows:
            ranks = np.arange(1, shape.num_nodes)
            is_accepted = (report.path[rows][:, :, None] == ranks).any(axis=1)
            self._policy.observe(is_accepted, shape.depth)

    def _made(self, shape: LookupShape) -> PlacedLookup:
        """Roots alone, until something is looked up."""
        tokens, parents = self._device.zeros(2, shape.batch, shape.num_nodes, dtype=torch.int32)
        num_nodes, match_len, longest = self._device.zeros(3, shape.batch, dtype=torch.int32)
        parents.fill_(-1)
        num_nodes.fill_(1)
        return PlacedLookup(shape, Proposal(tokens, parents, num_nodes), match_len, longest)


def _placed(plan: RoundPlan) -> PlacedLookup:
    assert isinstance(plan.shape, PlacedLookup)
    return plan.shape
