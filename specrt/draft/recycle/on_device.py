"""Token Recycling where the logits are: tables and trees stay on the device.

A tree has all of its template's nodes. What is not known behind a token is token 0, which costs a
row and moves no text; so a node has the same place in every tree, and a round's report says of
each rank path how often it was right.

Drafting is a launch and learning another, so that a whole round may be launches alone: what comes
of it is then told as late as its report is read, and trees get their sizes from earlier rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from specrt import ops
from specrt.device import Device, Mark
from specrt.draft.base import BatchTables, Budget, DraftParams, RoundPlan, StageTimes
from specrt.draft.length.envelope import GPU_ENVELOPES
from specrt.draft.length.measured import MeasuredPolicy
from specrt.draft.recycle.device_tables import DeviceTables, Slots
from specrt.draft.recycle.drafter import accepted_nodes, check_logits, template_of
from specrt.draft.recycle.template import NUM_RANKS, Template
from specrt.models.step import LOGITS_TAP
from specrt.reuse import Recent
from specrt.tree import MAX_NODES, chain
from specrt.types import AcceptResult, DraftTree, Proposal, RoundReport, SequenceState

_MAX_KINDS = 64  # of trees whose buffers are kept


class _Kind(NamedTuple):
    """What the buffers of a batch's trees follow from."""

    batch: int
    template: Template
    num_nodes: int
    """The first so many of the template."""


@dataclass(frozen=True, eq=False)
class _Buffers:
    """Static tensors of trees of one kind."""

    kind: _Kind
    tree: Proposal
    """Only its tokens are written."""
    ranks: torch.Tensor
    """``[M]`` int32, of the template."""
    workspace: torch.Tensor
    """To learn with."""

    @classmethod
    def make(cls, kind: _Kind, vocab_size: int, device: Device) -> _Buffers:
        batch, template, size = kind
        parents, ranks = device.there(
            torch.from_numpy(np.stack([template.parents, template.ranks])[:, :size]).int()
        )
        tokens = device.zeros(batch, size, dtype=torch.int32)
        tree = Proposal(tokens, parents.repeat(batch, 1), torch.full_like(tokens[:, 0], size))
        floats = ops.recycle_learn_workspace(batch * size, vocab_size, NUM_RANKS)
        return cls(kind, tree, ranks, device.zeros(floats))

    def launch_propose(
        self, slots: Slots, order: torch.Tensor, roots: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """Fill the template: ``tokens [B, M]`` below ``roots [B]``, of the tables ``order [B]``."""
        parents = self.tree.parents[0]
        ops.recycle_propose(slots.rows, order, roots, parents, self.ranks, tokens)


@dataclass(frozen=True, eq=False)
class _Drafted(Proposal):
    """A proposal of a round that is not launched as a whole."""

    buffers: _Buffers = field(kw_only=True)
    marks: tuple[Mark, Mark] = field(kw_only=True)
    """When it was made, to be compared once the round is read."""


@dataclass(frozen=True)
class _Shape:
    """Of a launched round; equal ones have the very same buffers and tables."""

    buffers: _Buffers
    slots: Slots


class DeviceRecycleDrafter:
    """As :class:`~specrt.draft.recycle.drafter.RecycleDrafter`, on a GPU.

    Args:
        vocab_size: V of the target.
        device: the target's.
    """

    taps: tuple[str, ...] = (LOGITS_TAP,)

    def __init__(self, vocab_size: int, device: Device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._tables = DeviceTables(vocab_size, device)
        self._buffers: Recent[_Kind, _Buffers] = Recent(_MAX_KINDS)
        self._policy = MeasuredPolicy(envelopes=GPU_ENVELOPES)

    def start(self, state: SequenceState) -> None:
        """Take a copy of what is known."""
        if self._tables.is_empty:
            self._policy.welcome(state.num_left)
        self._tables.open(state)

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """The prompt's rows have no logits."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """Read a tree of each sequence off its table."""
        begun = self._device.mark()
        reach = max(state.num_left for state in states) - 1
        buffers = self._sized(len(states), budget, reach)
        roots = [state.token_ids[-1] for state in states]
        if buffers.kind.num_nodes == 1:
            return chain(torch.tensor(roots, dtype=torch.int32)[:, None])
        ints = torch.tensor([self._tables.numbers(states), roots], dtype=torch.int32)
        order, there = self._device.there(ints)
        tokens = torch.empty_like(buffers.tree.draft_tokens)  # others may be asked for before it
        buffers.launch_propose(self._tables.slots, order, there, tokens)
        fixed, marks = buffers.tree, (begun, self._device.mark())
        return _Drafted(tokens, fixed.parents, fixed.num_nodes, buffers=buffers, marks=marks)

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Learn from every verified row, and how far the trees were right.

        Raises:
            ValueError: the logits are of another vocabulary.
        """
        batch, size = len(states), min(taps[LOGITS_TAP].shape[1], proposal.draft_tokens.shape[1])
        counts = [size] * batch if result.report is None else result.report.num_nodes.tolist()
        ints = torch.tensor([self._tables.numbers(states), counts], dtype=torch.int32)
        order, num_nodes = self._device.there(ints)
        tokens = self._device.there(proposal.draft_tokens)[:, :size]
        floats = ops.recycle_learn_workspace(batch * size, self._vocab_size, NUM_RANKS)
        workspace = self._device.zeros(floats)
        slots = self._tables.slots
        self._learn(slots, order, taps, tokens, num_nodes, result, workspace)
        if isinstance(proposal, _Drafted):
            self._policy.observe_draft(self._device.ms_between(*proposal.marks), 0.0, 0)
            self._judge(proposal.buffers.kind, result.paths)

    def finish(self, state: SequenceState) -> None:
        """Forget the sequence, but not what it has learned."""
        self._tables.close(state)

    # --- rounds that are launches alone -------------------------------------------------------

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan:
        """How large the trees are; how near an output's end is, which the host learns too late, is
        not looked at."""
        buffers = self._sized(len(states), budget, MAX_NODES)
        return RoundPlan(buffers.kind.num_nodes, _Shape(buffers, self._tables.place(states)))

    def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
        """Read a tree of each sequence off its table."""
        buffers, slots, order = _parts(plan)
        if plan.num_nodes > 1:
            buffers.launch_propose(slots, order, tables.roots, buffers.tree.draft_tokens)
        return buffers.tree

    def launch_observe(
        self,
        plan: RoundPlan,
        tables: BatchTables,
        tree: DraftTree,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Learn from every verified row.

        Raises:
            ValueError: the logits are of another vocabulary.
        """
        buffers, slots, order = _parts(plan)
        given = tree.draft_tokens, tree.num_nodes, result, buffers.workspace
        self._learn(slots, order, taps, *given)

    def told(
        self,
        states: Sequence[SequenceState],
        plan: RoundPlan,
        report: RoundReport,
        times: StageTimes,
    ) -> None:
        """Learn what the trees took, and how far they were right."""
        self._policy.observe_draft(times.draft, 0.0, 0)
        self._judge(_parts(plan)[0].kind, report.path)

    # --- both ---------------------------------------------------------------------------------

    def _sized(self, batch: int, budget: Budget, reach: int) -> _Buffers:
        """Of trees as large as pays; of one node where drafting pauses."""
        template = template_of(budget, reach)
        size = len(template.parents)
        if budget.params == DraftParams():
            scores = np.tile(template.scores[1:], (batch, 1))
            is_drafted = size > 1 and self._policy.begin() is not None
            size = self._policy.size(scores, 1, budget.cost) if is_drafted else 1
        kind = _Kind(batch, template, size)
        known = self._buffers.get(kind)
        if known is None:
            made = _Buffers.make(kind, self._vocab_size, self._device)
            known = self._buffers.put(kind, made)
        return known

    def _learn(
        self,
        slots: Slots,
        order: torch.Tensor,
        taps: Mapping[str, torch.Tensor],
        tokens: torch.Tensor,
        num_nodes: torch.Tensor,
        result: AcceptResult,
        workspace: torch.Tensor,
    ) -> None:
        check_logits(taps[LOGITS_TAP], self._vocab_size)
        ops.recycle_learn(
            taps[LOGITS_TAP][:, : tokens.shape[1]],
            tokens,
            num_nodes,
            result.path,
            result.accept_length,
            order,
            slots.rows,
            slots.is_own,
            workspace,
        )

    def _judge(self, kind: _Kind, paths: np.ndarray) -> None:
        """Take what came of trees of a kind."""
        if kind.num_nodes > 1:
            scores = np.tile(kind.template.scores[1 : kind.num_nodes], (kind.batch, 1))
            is_accepted = accepted_nodes(paths, kind.num_nodes)
            self._policy.observe_outcome(scores, is_accepted[:, 1:], 1)


def _parts(plan: RoundPlan) -> tuple[_Buffers, Slots, torch.Tensor]:
    """A plan's buffers, and the tables in the order of the batch's rows."""
    assert isinstance(plan.shape, _Shape)
    buffers, slots = plan.shape.buffers, plan.shape.slots
    return buffers, slots, slots.order[: buffers.kind.batch]
