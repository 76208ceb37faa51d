"""FSPAD and EAGLE-2 on a GPU, whose rounds may be launches alone.

A round runs the pairs that the one before has accepted, grows and ranks the trees, and keeps the
accepted features where the next round finds them (:mod:`specrt.draft.fspad.pairs`). What the host
needs of that, it is told a round late: how deep trees are, and how large, follows from the reports
and times of the rounds before. With a draft controller trees are large enough for all of its
levels, and how deep each grows is decided in between, on the device.

Where the host is needed (no pages for two rounds, a sequence without features) a round is proposed
and observed as on the CPU. Pairs then move from the rows of a table to their sequences, and back
with the next launched round; so they do where sequences join, leave or change rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from specrt.draft.base import BatchTables, Budget, DraftParams, RoundPlan, StageTimes
from specrt.draft.coupling import Coupling
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.fspad.layer import DraftLayer
from specrt.draft.fspad.pairs import MAX_PAIRS, PairTable
from specrt.draft.fspad.round import Places, RoundBuffers, num_candidates
from specrt.draft.fspad.tree_control import LevelControl, TreeControl
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.controlled import NODES_A_LEVEL, ControlledPolicy
from specrt.draft.length.costs import DraftCosts, RoundCost
from specrt.draft.length.device_control import DeviceControlRound
from specrt.draft.length.envelope import GPU_ENVELOPES
from specrt.reuse import Recent, power_of_two
from specrt.types import AcceptResult, DraftTree, Proposal, RoundReport, SequenceState

_LEVELS = (1, 2, 3, 4, 6, 9, 16)
"""Depths of trees whose sizes are chosen here: few, because each is captured once as a graph."""
_FADING = 0.99  # of the longest time, a round
_MAX_TIMED = 64  # kinds of round of which it is known that they were run


class Step(NamedTuple):
    """What is launched of a round; a :class:`RoundPlan`'s shape."""

    buffers: RoundBuffers
    table: tuple[int, ...]
    """Where the draft cache's page table lies, its strides and sizes."""
    num_pairs: int
    """Waiting pairs of a sequence that are run, at most; 0: all go on waiting."""
    num_levels: int
    """0: the root alone."""
    is_chosen: bool
    """Whether sizes were chosen here, and are learned of."""
    control: DeviceControlRound | None
    """Who decides how deep each tree grows; None: to the last level."""
    version: int
    """Of the device's steps: once they were forgotten, it is launched piece by piece again."""


@dataclass(eq=False)
class _Seats:
    """Sequences whose pairs lie in the rows of a table, as long as the batch stays what it is.

    There is one for each engine that asks: of these each may have a round under way.
    """

    states: list[SequenceState | None]
    """None: it has left."""
    table: PairTable
    before: Step | None = None
    """Planned last, and maybe under way."""


class _Sizes(NamedTuple):
    num_levels: int
    num_nodes: int


_ROOT = _Sizes(0, 1)


class DeviceFspadDrafter(FspadDrafter):
    """As :class:`FspadDrafter`, on a GPU.

    Args:
        layer: as there; on a GPU.
        is_coupled: as there.
        control: as there.
    """

    def __init__(
        self,
        layer: DraftLayer,
        *,
        is_coupled: bool = True,
        control: ControlOptions | None = None,
    ) -> None:
        super().__init__(layer, is_coupled=is_coupled, control=control)
        self._control = None if control is None else TreeControl(control, layer.device)
        self._seats: list[_Seats] = []
        # Pairs of those who have a seat, as far as reports have been read.
        self._waiting: dict[SequenceState, int] = {}
        self._timed: Recent[Step, bool] = Recent(_MAX_TIMED)
        self._longest_ms = 0.0  # that a level of a controlled round took of late

    def start(self, state: SequenceState) -> None:
        """Open an empty draft cache."""
        super().start(state)
        if self._control is not None:
            self._control.start(state)

    def finish(self, state: SequenceState) -> None:
        """Free the sequence's pages."""
        for seats in self._seats:
            seats.states = [None if one is state else one for one in seats.states]
        self._seats = [seats for seats in self._seats if any(seats.states)]
        self._waiting.pop(state, None)
        super().finish(state)
        if self._control is not None:
            self._control.finish(state)

    # --- rounds with the host in between ------------------------------------------------------

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """As :meth:`FspadDrafter.propose`."""
        self._unseat(states)
        return super().propose(states, budget)

    # --- rounds of launches alone -------------------------------------------------------------

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan | None:
        """Pages for a tree and for what is accepted meanwhile, and how large the tree is to be."""
        depth, top_k, _ = self._shape(budget.params)
        try:
            seats = self._seat(states)
            if seats is None:
                return None
            self._reserve(states, seats.before, max(0, depth - 1) * top_k)
        except MemoryError:  # a round at a time needs less
            return None
        cached = [self._drafts[state].cached for state in states]
        batch = self._batch.update(cached, is_ahead=True)
        self.layer.prepare(batch, top_k)
        buffers = self._buffers(states, batch, top_k, seats.table)
        sizes = self._sizes(len(states), budget)
        buffers.choice(sizes.num_nodes)  # made here, as launches make nothing
        table = batch.block_table.data_ptr(), *batch.block_table.stride(), *batch.block_table.shape
        num_levels, is_chosen = sizes.num_levels, budget.params == DraftParams()
        control = None
        if is_chosen and num_levels and self._control is not None:
            control = self._control.staged(states, self._price(len(states), budget.cost))
        num_pairs = self._num_pairs(states, seats.before, num_levels)
        version = self.layer.device.version
        step = Step(buffers, table, num_pairs, num_levels, is_chosen, control, version)
        seats.before = step
        return RoundPlan(sizes.num_nodes, step)

    def _reserve(
        self, states: Sequence[SequenceState], before: Step | None, num_expanded: int
    ) -> None:
        """Pages for all pairs there may be and the nodes that are expanded.

        Raises:
            MemoryError: there are none.
        """
        num_unread = 0 if before is None else 1 + before.num_levels
        for state in states:
            # There is a pair less than tokens; in its row writes who has none waiting.
            rows = len(state.token_ids) + num_unread + num_expanded
            self._cache.reserve(self._drafts[state].cached, rows)

    def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
        """Run the waiting pairs, then grow the trees level by level."""
        step = plan.shape
        assert isinstance(step, Step)
        buffers, places = step.buffers, self._places(step, tables)
        num_levels = step.num_levels
        if num_levels == 0:
            if step.num_pairs:
                buffers.append_pairs(step.num_pairs, self._cache, places)
            roots = tables.roots[:, None]  # nothing of a root is read
            return Proposal(roots, roots, tables.history_len)
        if places.control is not None:
            places.control.begin()
        buffers.extend(step.num_pairs, self._cache, places)
        for level in range(1, num_levels):
            buffers.expand(level, self._cache, places)
        choice = buffers.choice(plan.num_nodes)
        buffers.choose(num_levels, choice, places)
        return Proposal(choice.draft_tokens, choice.parents, choice.num_nodes)

    def _places(self, step: Step, tables: BatchTables) -> Places:
        """What the steps read of the batch."""
        is_coupled, control = step.buffers.key.is_coupled, step.control
        return Places(
            self._batch.block_table,
            tables.roots,
            Coupling(tables.sampling.rows, tables.history_len) if is_coupled else None,
            None if control is None else LevelControl(control, tables.history_len),
        )

    def launch_observe(
        self,
        plan: RoundPlan,
        tables: BatchTables,
        tree: DraftTree,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Keep the features of the accepted path, which the next tree grows from."""
        step = plan.shape
        assert isinstance(step, Step)
        step.buffers.pairs.take(tables, result, taps, are_kept=step.num_pairs == 0)
        if step.control is not None:
            step.control.launch_update(result.accept_length)

    def told(
        self,
        states: Sequence[SequenceState],
        plan: RoundPlan,
        report: RoundReport,
        times: StageTimes,
    ) -> None:
        """How many pairs were run and wait by now; what drafting was worth, and what it took."""
        step = plan.shape
        assert isinstance(step, Step)
        for state, taken in zip(states, report.num_taken.tolist(), strict=True):
            if state not in self._waiting:
                continue
            if step.num_pairs:
                self._drafts[state].cached.length += self._waiting[state]
                self._waiting[state] = 0
            self._waiting[state] += taken
        if step.is_chosen and step.num_levels:
            self._learn_of(plan.num_nodes, step, report)
            self._time(step, times)
            if self._control is not None:
                self._control.hear(report)

    # --- whose pairs lie where ----------------------------------------------------------------

    def _seat(self, states: Sequence[SequenceState]) -> _Seats | None:
        """See to it that the sequences' pairs lie in the rows of a table; None: one has none.

        Where they do not, no round of theirs is under way.
        """
        for seats in self._seats:
            if list(states) == seats.states:
                return seats
        self._unseat(states)
        drafts = [self._drafts[state] for state in states]
        if not all(len(draft.pending) for draft in drafts):
            return None
        for state, draft in zip(states, drafts, strict=True):
            if len(draft.pending) > MAX_PAIRS:
                self._absorb(state, keep=1)
        batch = self._batch.update([draft.cached for draft in drafts])
        pending = [draft.pending for draft in drafts]
        made = _Seats(list(states), self._pairs_of(len(states)))
        made.table.stage(states, batch, pending, is_coupled=False)
        for state, draft in zip(states, drafts, strict=True):
            self._waiting[state] = len(draft.pending)
            draft.pending = draft.pending[:0]
        self._seats.append(made)
        return made

    def _unseat(self, states: Sequence[SequenceState]) -> None:
        """Give all pairs back to ``states``, and to those who sat beside one of them. No round of
        theirs is under way."""
        for seats in [s for s in self._seats if any(state in s.states for state in states)]:
            for row, state in enumerate(seats.states):
                count = 0 if state is None else self._waiting.pop(state, 0)
                if state is not None and count:
                    self._drafts[state].pending = seats.table.waiting(row, count).clone()
            self._seats.remove(seats)

    def _is_taken(self, table: PairTable) -> bool:
        return any(seats.table is table for seats in self._seats)

    def _num_pairs(
        self, states: Sequence[SequenceState], before: Step | None, num_levels: int
    ) -> int:
        """Pairs of a sequence that the next round is to run; 0: they go on waiting."""
        most = max(self._waiting[state] for state in states)
        if before is not None:
            most = max(most, 1 + before.num_levels) if before.num_pairs else most + 1
        if num_levels == 0 and most < MAX_PAIRS:
            return 0
        # Few numbers: not fewer than the round behind will have.
        return min(power_of_two(max(most, 1 + num_levels)), MAX_PAIRS)

    # --- how large trees are to be ------------------------------------------------------------

    def _sizes(self, batch: int, budget: Budget) -> _Sizes:
        """Of the next round's trees."""
        depth, top_k, total = self._shape(budget.params)
        most = min(total, budget.max_nodes)
        if depth < 1 or most < 2:
            return _ROOT
        if budget.params != DraftParams():
            return _Sizes(depth, min(most, 1 + num_candidates(depth, top_k)))
        if self._control is not None:
            num_levels = min(depth, self._control.max_levels)
            return _ROOT if self._control.rests() else _Sizes(num_levels, _roomy(num_levels, most))
        chosen = self._measured.begin()
        if chosen is None:
            return _ROOT
        masses, unseen = list[float](), np.full((batch, top_k), np.nan)
        for level in range(depth):
            masses.append(chosen.mass(unseen, level))
            if not chosen.expands(masses, batch, budget.cost):
                break
        num_levels = min(depth, next(n for n in _LEVELS if n >= len(masses)))
        num_nodes = chosen.size(np.full((batch, most - 1), np.nan), num_levels, budget.cost)
        return _Sizes(num_levels, num_nodes) if num_nodes > 1 else _ROOT

    def _price(self, batch: int, cost: RoundCost) -> DraftCosts:
        """What drafting costs by now, for a controller."""
        assert isinstance(self._policy, ControlledPolicy), "who has a controller has its policy"
        return self._policy.price(batch, cost)

    def _learn_of(self, num_nodes: int, step: Step, report: RoundReport) -> None:
        """Which nodes of the trees were on accepted paths, of those that had not ended before."""
        running = np.flatnonzero(report.num_taken > 0)
        is_accepted = np.zeros((len(running), num_nodes - 1))
        for place, row in enumerate(running):
            length = int(report.accept_length[row])
            is_accepted[place, report.path[row, 1 : 1 + length] - 1] = 1.0
        if len(running):
            unseen = np.full(is_accepted.shape, np.nan)
            self._measured.observe_outcome(unseen, is_accepted, step.num_levels)

    def _time(self, step: Step, times: StageTimes) -> None:
        """What a level took; the first time a kind of round comes up it waits for the host."""
        is_known = self._timed.get(step) is not None
        self._timed.put(step, True)
        if not is_known or times.draft <= 0.0:
            return
        # The step of the accepted pairs streams what a level does.
        level_ms, num_expanded = times.draft / step.num_levels, step.num_levels - 1
        if step.control is not None:
            # Levels that nobody wanted took next to nothing: all were run where it was longest.
            self._longest_ms = level_ms = max(level_ms, _FADING * self._longest_ms)
        self._measured.observe_draft(level_ms, level_ms * num_expanded, num_expanded)


def _roomy(num_levels: int, most: int) -> int:
    """Nodes of a tree that may have so many levels: an envelope, or all there may be."""
    return min(most, next((n for n in GPU_ENVELOPES if n > NODES_A_LEVEL * num_levels), most))
