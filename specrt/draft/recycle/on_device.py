"""Token Recycling where the logits are: tables and trees stay on the device.

A tree has all of its template's nodes. What is not known behind a token is token 0, which costs a
row and moves no text; so a node has the same place in every tree, and a round's report says of
each rank path how often it was right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from specrt.device import Device, Mark
from specrt.draft.base import Budget, DraftParams
from specrt.draft.length.envelope import GPU_ENVELOPES
from specrt.draft.length.measured import MeasuredPolicy
from specrt.draft.recycle.drafter import Recycled, accepted_nodes, check_logits, template_of
from specrt.draft.recycle.template import NUM_RANKS, Template
from specrt.models.step import LOGITS_TAP
from specrt.reuse import Recent
from specrt.tree import chain
from specrt.types import AcceptResult, Proposal, SequenceState

_MAX_TEMPLATES = 64  # whose indices are kept


class _Level(NamedTuple):
    """The nodes of one depth, as indices on the device."""

    nodes: torch.Tensor
    """``[n]`` int64"""
    parents: torch.Tensor
    ranks: torch.Tensor


class _Placed(NamedTuple):
    """A template on the device."""

    parents: torch.Tensor
    """``[M]`` int32; the root's is -1."""
    levels: tuple[_Level, ...]


@dataclass(frozen=True, eq=False)
class _Timed(Recycled):
    """A proposal, and when it was made."""

    marks: tuple[Mark, Mark] = (None, None)
    """To be compared once the round is read."""


class _Table:
    """The likeliest next tokens of each token, and which of them were learned here.

    Args:
        rows: ``[V + 1, R]`` int32; the last one takes what is not to be learned.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self._is_own = torch.zeros_like(rows[:, :1], dtype=torch.bool)

    def learn(self, tokens: torch.Tensor, ids: torch.Tensor, path: torch.Tensor) -> None:
        """Take what came behind a tree's nodes.

        Of several nodes of one token the last on the path counts; where none was, the first.

        Args:
            tokens: ``[n]`` int32, of the nodes.
            ids: ``[n, R]`` int32.
            path: ``[P]`` int32, accepted nodes.
        """
        nodes = torch.ones_like(tokens).cumsum(0) - 1
        is_accepted = (path[:, None] == nodes).any(dim=0)
        priority = torch.where(is_accepted, nodes + len(tokens), len(tokens) - 1 - nodes)
        is_same = tokens[:, None] == tokens
        is_beaten = (is_same & (priority[:, None] < priority)).any(dim=1)
        places = tokens.long().masked_fill(is_beaten, len(self.rows) - 1)
        self.rows[:, : ids.shape[1]].index_copy_(0, places, ids)
        self._is_own.index_fill_(0, places, True)

    def merged_into(self, known: torch.Tensor) -> torch.Tensor:
        """``known`` with what was learned here."""
        return torch.where(self._is_own, self.rows, known)


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
        self._known = device.zeros(vocab_size + 1, NUM_RANKS, dtype=torch.int32)
        self._tables: dict[SequenceState, _Table] = {}
        self._placed: Recent[Template, _Placed] = Recent(_MAX_TEMPLATES)
        self._policy = MeasuredPolicy(envelopes=GPU_ENVELOPES)

    def start(self, state: SequenceState) -> None:
        """Take a copy of what is known."""
        self._tables[state] = _Table(self._known.clone())

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """The prompt's rows have no logits."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """Read a tree of each sequence off its table."""
        begun = self._device.mark()
        roots = torch.tensor([[state.token_ids[-1]] for state in states], dtype=torch.int32)
        reach = max(state.num_left for state in states) - 1
        template = template_of(budget, reach)
        scores = np.tile(template.scores[1:], (len(states), 1))
        size = len(template.parents)
        if budget.params == DraftParams():
            is_drafted = size > 1 and self._policy.begin() is not None
            size = self._policy.size(scores, 1, budget.cost) if is_drafted else 1
        if size == 1:
            return chain(roots)
        tokens = self._grow(states, self._device.there(roots), template)[:, :size].contiguous()
        parents = self._place(template).parents[:size].expand(len(states), -1).contiguous()
        counts = torch.ones_like(tokens[:, 0]) * size
        marks = begun, self._device.mark()
        return _Timed(tokens, parents, counts, scores=scores[:, : size - 1], marks=marks)

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
        logits = taps[LOGITS_TAP]
        check_logits(logits, self._vocab_size)
        size = min(logits.shape[1], proposal.draft_tokens.shape[1])
        tokens = self._device.there(proposal.draft_tokens)
        ids = logits[:, :size].topk(min(NUM_RANKS, self._vocab_size), dim=2).indices.int()
        for row, state in enumerate(states):
            count = size if result.report is None else int(result.report.num_nodes[row])
            if result.lengths[row] >= 0:  # else its logits were NaN
                rows = slice(min(count, size))
                self._tables[state].learn(tokens[row, rows], ids[row, rows], result.path[row])
        if isinstance(proposal, _Timed):
            is_accepted = accepted_nodes(result, size)
            self._policy.observe_draft(self._device.ms_between(*proposal.marks), 0.0, 0)
            self._policy.observe_outcome(proposal.scores[:, : size - 1], is_accepted[:, 1:], 1)

    def finish(self, state: SequenceState) -> None:
        """Forget the sequence, but not what it has learned."""
        table = self._tables.pop(state, None)
        if table is not None:
            self._known = table.merged_into(self._known)

    def _grow(
        self, states: Sequence[SequenceState], roots: torch.Tensor, template: Template
    ) -> torch.Tensor:
        """``[B, M]`` int32: tokens of the template's nodes."""
        tables = torch.stack([self._tables[state].rows.flatten() for state in states])
        tokens = roots.expand(-1, len(template.parents)).contiguous()
        for level in self._place(template).levels:
            above = tokens.index_select(1, level.parents).long()
            tokens.index_copy_(1, level.nodes, tables.gather(1, above * NUM_RANKS + level.ranks))
        return tokens

    def _place(self, template: Template) -> _Placed:
        placed = self._placed.get(template)
        if placed is None:
            there = self._device.there
            parents = torch.from_numpy(template.parents).int()
            parents[0] = -1
            levels = [
                _Level(*map(there, map(torch.from_numpy, (nodes, above, ranks))))
                for nodes in template.levels
                for above, ranks in [(template.parents[nodes], template.ranks[nodes])]
            ]
            placed = self._placed.put(template, _Placed(there(parents), tuple(levels)))
        return placed
