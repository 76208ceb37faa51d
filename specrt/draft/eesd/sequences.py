"""What both drafters of EESD keep: an exit's cache of their sequences, buffers, costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple
from weakref import ref

import torch

from specrt.cache import CacheBatch, CachedSequence, KVCache
from specrt.draft.base import Budget, DraftParams
from specrt.draft.eesd.costs import CostMeter
from specrt.draft.eesd.model import ExitModel
from specrt.draft.eesd.round import MAX_DRAFT_NODES, EesdBuffers, EesdKey
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.costs import DraftCosts
from specrt.models.layer_run import LowerLayers
from specrt.reuse import Recent
from specrt.tree import MAX_NODES, chain
from specrt.types import AcceptResult, Proposal, SequenceState

_MAX_ROUNDS = 32  # kinds of round whose buffers are kept
# Where drafting does not pay, a rule that weighs time is asked once in so many rounds, for asking
# costs a tenth of a fast round; and it forgets more slowly, for a look back costs a round.
REST, REST_FORGOTTEN = 16, 4


@dataclass(eq=False)
class _Draft:
    """What is kept for one sequence."""

    cached: CachedSequence
    pending: list[torch.Tensor]
    """``[1, H]`` each: g of the roots of plain rounds, which the exit's cache lacks."""
    num_ahead: int = 0
    """Nodes of its launched round that was planned last: it may be under way."""


class Plan(NamedTuple):
    """What a round may draft."""

    num_branches: int
    caps: list[int]
    """Drafted levels of each of B sequences, at most."""
    is_fixed: bool
    """All of them, whatever the controller would say."""


class ExitSequences:
    """The part of an EESD drafter that is the same wherever its target runs.

    Args:
        exit_model: the exit, which knows its target.
        control: how long to draft.
        is_coupled: rank candidates with the noise the target will draw with, where the temperature
            is above 0. Moves trees, never tokens.
        costs: of a round's parts, in place of measured ones (which differ from run to run).
    """

    def __init__(
        self,
        exit_model: ExitModel,
        control: ControlOptions,
        is_coupled: bool,
        costs: DraftCosts | None,
    ) -> None:
        self.exit_model = exit_model
        self.taps: tuple[str, ...] = (exit_model.tap,)
        self.is_coupled = is_coupled
        self._device = exit_model.target.device
        self._options = control
        self._cache = exit_model.new_cache()
        self._drafts: dict[SequenceState, _Draft] = {}
        self._buffers: Recent[EesdKey, EesdBuffers] = Recent(_MAX_ROUNDS)
        self._batch = CacheBatch(self._cache)
        self._meter = CostMeter(exit_model)
        self._given_costs = costs
        self._rest_left = 0
        self._weighs_time = costs is None and control.kind == "cost-aware"

    @property
    def cache(self) -> KVCache:
        """Of the exit's keys and values."""
        return self._cache

    def costs(self, batch: int = 1) -> DraftCosts:
        """Milliseconds of a round's parts, as given or as measured so far."""
        return self._given_costs or self._meter.costs(batch)

    def check(self, params: DraftParams) -> None:
        """Whether a round's buffers have room for such trees.

        Raises:
            ValueError: ``depth`` and ``top_k`` ask for more than 62 drafted nodes, or ``top_k`` for
                more than the vocabulary.
        """
        width, vocab_size = params.top_k or 1, self.exit_model.target.config.vocab_size
        if width > vocab_size:
            raise ValueError(f"top_k: expected at most the vocabulary {vocab_size}, got {width}")
        asked = 1 if params.depth is None else params.depth
        if asked * width > MAX_DRAFT_NODES:
            raise ValueError(
                f"depth, top_k: expected at most {MAX_DRAFT_NODES} drafted nodes, "
                f"got {asked} levels of {width}"
            )

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """Run the exit's keys and values for a piece of the prompt.

        Raises:
            MemoryError: the exit's cache has no pages for them.
        """
        self._absorb(state, taps[self.exit_model.tap][0])
        self._cache.keep(self._drafts[state].cached, state.cache_salt, state.token_ids)

    def num_known(self, state: SequenceState, most: int) -> int:
        """Those whose rows the exit's cache has."""
        return self._cache.find(state.cache_salt, state.token_ids, most)[0]

    def begin_at(self, state: SequenceState, count: int) -> None:
        """Take these rows up.

        Raises:
            MemoryError: the exit's cache has no page for their end.
        """
        self._cache.take_up(self._drafts[state].cached, state.cache_salt, state.token_ids, count)

    # --- a round ------------------------------------------------------------------------------

    def _lent(self, budget: Budget) -> LowerLayers:
        lower = budget.lower
        if lower is None or lower.model is not self.exit_model.target:
            raise ValueError(
                "drafter: expected an engine of the very target that this EESD drafter was loaded "
                f"for, got {'none' if lower is None else 'another'}"
            )
        return lower

    def _is_resting(self, budget: Budget) -> bool:
        """Whether to leave this round plain without having asked, and count it."""
        if self._rest_left == 0 or budget.params != DraftParams():
            return False
        self._rest_left -= 1
        return True

    def _plan(self, states: Sequence[SequenceState], budget: Budget, most: int) -> Plan:
        """What may be drafted; ``most`` levels if the caller does not say how many."""
        params = budget.params
        self.check(params)
        width = params.top_k or 1
        is_fixed = params.depth is not None
        wanted = most if params.depth is None else params.depth
        total = min(params.total_tokens or MAX_NODES, budget.max_nodes, 1 + MAX_DRAFT_NODES)
        width = min(width, max(1, total - 1))  # a narrower level rather than none
        most = min(wanted, (total - 1) // width)
        # The bonus token takes the last place.
        caps = [max(0, min(most, state.num_left - 1)) for state in states]
        return Plan(width, caps, is_fixed)

    def _make_room(self, states: Sequence[SequenceState], plan: Plan, lower: LowerLayers) -> Plan:
        """Pages in both caches; fewer levels where the target has no more of them."""
        if not any(plan.caps):
            return plan
        width = plan.num_branches
        rooms = lower.reserve([1 + cap * width for cap in plan.caps])
        caps = [min(cap, (room - 1) // width) for cap, room in zip(plan.caps, rooms, strict=True)]
        for state, cap in zip(states, caps, strict=True):
            draft = self._drafts[state]
            num_rows = len(draft.pending) + 1 + cap * width
            self._cache.reserve(draft.cached, draft.cached.length + num_rows)
        return plan if caps == plan.caps else plan._replace(caps=caps)

    def _is_plain_due(self, plan: Plan) -> bool:
        """Whether to draft nothing, to see what that takes."""
        return self._weighs_time and not plan.is_fixed and self._meter.is_plain_due()

    def _run(self, buffers: EesdBuffers, step: int, launch: Callable[[], None]) -> bool:
        """Run a step of ``buffers``, that of level ``abs(step)``; whether it had run before."""
        # A graph holds addresses of all of these; as part of its key they outlive it.
        key = (self, buffers, buffers.run.cache, self._cache, step)
        had_run = self._device.run(key, launch)
        buffers.run.tell_launched(abs(step))
        return had_run

    def _hear(
        self,
        states: Sequence[SequenceState],
        is_plain: bool,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Commit the accepted path in the exit's cache too."""
        if is_plain:
            self._keep_roots(states, taps)
            return
        batch = self._batch_of(states)
        batch.move(result.path, result.accept_length + 1)
        batch.advance([1 + length for length in result.lengths])

    # --- sequences and buffers ----------------------------------------------------------------

    def _open(self, state: SequenceState) -> None:
        self._drafts[state] = _Draft(self._cache.open(), [])

    def _close(self, state: SequenceState) -> None:
        """Free the sequence's pages, if it had been opened."""
        draft = self._drafts.get(state)
        if draft is None:
            return
        try:
            if self._cache.is_shared:
                with suppress(MemoryError):
                    self._catch_up([state])  # or plain rounds' tokens would be missing
                self._cache.keep(draft.cached, state.cache_salt, state.token_ids, is_over=True)
        finally:
            self._cache.close(draft.cached)
            self._drafts.pop(state)  # not before: interrupted, it is found again

    def _batch_of(self, states: Sequence[SequenceState]) -> CacheBatch:
        return self._batch.update([self._drafts[state].cached for state in states])

    def _buffers_of(
        self,
        states: Sequence[SequenceState],
        lower: LowerLayers,
        drafts: CacheBatch,
        plan: Plan,
    ) -> EesdBuffers:
        is_coupled = self.is_coupled and any(state.temperature > 0 for state in states)
        widths = lower.table_width, drafts.block_table.shape[1]
        key = EesdKey(ref(lower.cache), len(states), *widths, plan.num_branches, is_coupled)
        buffers = self._buffers.get(key)
        if buffers is None:
            max_levels = MAX_DRAFT_NODES // plan.num_branches
            buffers = self._buffers.put(key, EesdBuffers(key, self.exit_model, max_levels))
        return buffers

    def _keep_roots(
        self, states: Sequence[SequenceState], taps: Mapping[str, torch.Tensor]
    ) -> None:
        """Of a plain round: the exit's cache takes its roots when drafting goes on."""
        roots = taps[self.exit_model.tap][:, 0].clone()  # others may have trees
        for state, root in zip(states, roots.split(1), strict=True):
            self._drafts[state].pending.append(root)

    def _catch_up(self, states: Sequence[SequenceState]) -> None:
        """Give the exit's cache the roots of plain rounds."""
        for state in states:
            draft = self._drafts[state]
            if draft.pending:
                pending = torch.cat(draft.pending)
                self._cache.reserve(draft.cached, draft.cached.length + len(pending))
                draft.pending = []  # first: interrupted, they are missing, and not there twice
                self._absorb(state, pending)

    def _absorb(self, state: SequenceState, hidden: torch.Tensor) -> None:
        cached = self._drafts[state].cached
        self._cache.reserve(cached, cached.length + len(hidden))
        self.exit_model.absorb(hidden, CacheBatch(self._cache, [cached]))


def roots_alone(states: Sequence[SequenceState]) -> Proposal:
    """Trees of one node."""
    return chain(torch.tensor([[state.token_ids[-1]] for state in states], dtype=torch.int32))
