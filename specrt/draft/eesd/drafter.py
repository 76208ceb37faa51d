"""EESD: the target drafts for itself, with its first N layers and one trained exit layer.

A round runs the root, then drafted token after drafted token, through the target's own first N
layers, the exit layer and the head; after each a controller decides whether the next one will pay.
Verification takes the nodes up at layer N, so the first N layers run once for every token, with one
cache (arXiv 2406.03853, section 3). Drafts are deterministic, or coupled to the target's noise, and
accepted by equality: a controller may therefore stop, or drop a draft, for whatever reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import NamedTuple
from weakref import ref

import numpy as np
import torch

from specrt.cache import CacheBatch, CachedSequence, KVCache
from specrt.draft.base import Budget, DraftParams
from specrt.draft.eesd.costs import CostMeter, RoundTimes
from specrt.draft.eesd.model import ExitModel
from specrt.draft.eesd.round import MAX_DRAFT_NODES, EesdBuffers, EesdKey, EesdProposal
from specrt.draft.length.control import ControlOptions, ControlRound, DraftControl
from specrt.draft.length.costs import DraftCosts
from specrt.models.layer_run import LowerLayers
from specrt.reuse import Recent
from specrt.tree import MAX_NODES, chain
from specrt.types import AcceptResult, Proposal, SequenceState

_MAX_ROUNDS = 32  # kinds of round whose buffers are kept
# Where drafting does not pay, a rule that weighs time is asked once in so many rounds, for asking
# costs a tenth of a fast round; and it forgets more slowly, for a look back costs a round.
_REST, _REST_FORGOTTEN = 16, 4


@dataclass(eq=False)
class _Draft:
    """What is kept for one sequence."""

    cached: CachedSequence
    pending: list[np.ndarray]
    """``[1, H]`` each: g of the roots of plain rounds, which the exit's cache lacks."""


class _Plan(NamedTuple):
    """What a round may draft."""

    num_branches: int
    caps: list[int]
    """Drafted levels of each of B sequences, at most."""
    is_fixed: bool
    """All of them, whatever the controller would say."""


class EesdDrafter:
    """Drafts with an exit of the target.

    :class:`DraftParams`: ``depth`` fixes the number of drafted levels, ``top_k`` makes a tree of
    so many branches (by default a chain), ``total_tokens`` bounds it.

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
        control: ControlOptions | None = None,
        *,
        is_coupled: bool = True,
        costs: DraftCosts | None = None,
    ) -> None:
        self.exit_model = exit_model
        self.taps: tuple[str, ...] = (exit_model.tap,)
        self.is_coupled = is_coupled
        self.control = DraftControl(control or ControlOptions())
        self._cache = exit_model.new_cache()
        self._drafts: dict[SequenceState, _Draft] = {}
        self._buffers: Recent[EesdKey, EesdBuffers] = Recent(_MAX_ROUNDS)
        # Those that no open proposal has.
        self._controls: defaultdict[tuple[int, bool], list[ControlRound]] = defaultdict(list)
        self._batch = CacheBatch(self._cache)
        self._meter = CostMeter(exit_model)
        self._given_costs = costs
        self._rest_left = 0
        self._weighs_time = costs is None and self.control.options.kind == "cost-aware"

    def costs(self, batch: int = 1) -> DraftCosts:
        """Milliseconds of a round's parts, as given or as measured so far."""
        return self._given_costs or self._meter.costs(batch)

    # --- the protocol -------------------------------------------------------------------------

    @property
    def cache(self) -> KVCache:
        """Its keys and values."""
        return self._cache

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

    def start(self, state: SequenceState) -> None:
        """Open a sequence in the exit's cache; it takes pages as it grows."""
        self._drafts[state] = _Draft(self._cache.open(), [])
        self.control.start(state)

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """Run the exit's keys and values for a piece of the prompt.

        Raises:
            MemoryError: the exit's cache has no pages for them.
        """
        self._absorb(state, taps[self.exit_model.tap][0])

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> EesdProposal:
        """Draft while the controller goes on.

        Raises:
            ValueError: as :meth:`check`, or the budget lends no layers of the exit's target.
            MemoryError: the exit's cache has no pages for a draft.
        """
        lower = budget.lower
        if lower is None or lower.model is not self.exit_model.target:
            raise ValueError(
                "drafter: expected an engine of the very target that this EESD drafter was loaded "
                f"for, got {'none' if lower is None else 'another'}"
            )
        if self._rest_left > 0 and budget.params == DraftParams():
            self._rest_left -= 1
            return _roots(states)
        begun = perf_counter()
        plan = self._make_room(states, self._plan(states, budget), lower)
        if not any(plan.caps) or self._is_plain_due(plan):
            return _roots(states, begun)
        control = None if plan.is_fixed else self._ask(states, plan)
        if control is not None and not self._is_any_open(control, plan, 0):
            self._rest_left = _REST - 1 if self._weighs_time else 0
            return _roots(states, begun, control, plan.num_branches)
        begun += self._catch_up(states)
        drafts = self._batch_of(states)
        buffers = self._buffers_of(states, lower, drafts, plan)
        buffers.stage(states, lower, drafts)
        return self._draft(buffers, plan, control, begun)

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Commit the accepted path in the exit's cache too, and learn from it."""
        assert isinstance(proposal, EesdProposal), "the engine gives back what it was given"
        observed, is_plain = perf_counter(), proposal.buffers is None
        if is_plain:
            self._keep_roots(states, taps)
        else:
            self._batch_of(states).commit(result.path, result.accept_length + 1)
        control = proposal.control
        if control is not None:
            num_rounds = _REST_FORGOTTEN if is_plain and self._weighs_time else 1
            control.update(self.control, states, result.lengths, num_rounds)
            self._controls[len(states), proposal.num_branches == 1].append(control)
        if proposal.times is not None and self._given_costs is None:
            self._meter.observe(proposal.times, observed, perf_counter())

    def finish(self, state: SequenceState) -> None:
        """Free the sequence's pages."""
        draft = self._drafts.pop(state, None)
        if draft is not None:
            self._cache.close(draft.cached)
            self.control.finish(state)

    # --- a round ------------------------------------------------------------------------------

    def _plan(self, states: Sequence[SequenceState], budget: Budget) -> _Plan:
        params = budget.params
        self.check(params)
        width = params.top_k or 1
        is_fixed = params.depth is not None
        wanted = self.control.options.max_draft if params.depth is None else params.depth
        total = min(params.total_tokens or MAX_NODES, budget.max_nodes, 1 + MAX_DRAFT_NODES)
        width = min(width, max(1, total - 1))  # a narrower level rather than none
        most = min(wanted, (total - 1) // width)
        # The bonus token takes the last place.
        caps = [max(0, min(most, state.num_left - 1)) for state in states]
        return _Plan(width, caps, is_fixed)

    def _make_room(self, states: Sequence[SequenceState], plan: _Plan, lower: LowerLayers) -> _Plan:
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

    def _is_plain_due(self, plan: _Plan) -> bool:
        """Whether to draft nothing, to see what that takes."""
        return self._weighs_time and not plan.is_fixed and self._meter.is_plain_due()

    def _ask(self, states: Sequence[SequenceState], plan: _Plan) -> ControlRound:
        """A controller, asked who is to draft at all."""
        is_chain = plan.num_branches == 1
        unused = self._controls[len(states), is_chain]
        slope = self.exit_model.slope if is_chain else None
        control = unused.pop() if unused else self.control.new_round(len(states), slope)
        control.stage(self.control, states, self.costs(len(states)))
        control.decide(0, None, None)
        return control

    def _draft(
        self, buffers: EesdBuffers, plan: _Plan, control: ControlRound | None, begun: float
    ) -> EesdProposal:
        """Run level after level, and propose those that are to be verified."""
        most, level = max(plan.caps), 0
        started, were_captured = perf_counter(), True
        while level < most:
            buffers.stage_level(level)
            were_captured &= self._run(buffers, level, partial(buffers.draft, level, self._cache))
            level += 1
            if control is not None and not self._goes_on(control, buffers, plan, level):
                break
        stepped, lower = perf_counter(), None
        lengths = [min(cap, level) for cap in plan.caps]
        if control is not None:
            lengths = control.length.tolist()
        if max(lengths) == level:
            buffers.stage_level(level)
            were_captured &= self._run(buffers, -level, partial(buffers.close, level, self._cache))
            lower = perf_counter() - stepped
        tree = buffers.tree(lengths)
        sizes, steps = (tree[0].numel(), len(lengths)), stepped - started
        times = RoundTimes(begun, perf_counter(), *sizes, steps, level, lower, were_captured)
        return EesdProposal(*tree, None, times, control, plan.num_branches, buffers, level)

    def _goes_on(
        self, control: ControlRound, buffers: EesdBuffers, plan: _Plan, level: int
    ) -> bool:
        """Tell the controller of the drafts just made; whether a sequence wants more."""
        last = buffers.levels[level - 1]
        if plan.num_branches == 1:
            control.decide(level, last.first_score, last.first_evidence)
        else:
            control.decide(level, buffers.level_score(level - 1), None)
        return self._is_any_open(control, plan, level)

    def _is_any_open(self, control: ControlRound, plan: _Plan, level: int) -> bool:
        """Whether a sequence is to draft on; those at their cap are closed."""
        for row, cap in enumerate(plan.caps):
            if cap <= level:
                control.is_open[row] = 0
        return 1 in control.is_open.tolist()

    def _run(self, buffers: EesdBuffers, step: int, launch: Callable[[], None]) -> bool:
        """Run a step of ``buffers``; whether it had run before."""
        # A graph holds addresses of all of these; as part of its key they outlive it.
        key = (self, buffers, buffers.run.cache, self._cache, step)
        return self.exit_model.target.device.run(key, launch)

    # --- sequences and buffers ----------------------------------------------------------------

    def _batch_of(self, states: Sequence[SequenceState]) -> CacheBatch:
        return self._batch.update([self._drafts[state].cached for state in states])

    def _buffers_of(
        self,
        states: Sequence[SequenceState],
        lower: LowerLayers,
        drafts: CacheBatch,
        plan: _Plan,
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
        hidden = taps[self.exit_model.tap].numpy()
        for row, state in enumerate(states):
            self._drafts[state].pending.append(hidden[row, :1].copy())  # others may have trees

    def _catch_up(self, states: Sequence[SequenceState]) -> float:
        """Give the exit's cache the roots of plain rounds; seconds that took, for they are not
        what a drafted round among drafted ones takes."""
        begun = perf_counter()
        for state in states:
            draft = self._drafts[state]
            if draft.pending:
                self._absorb(state, torch.from_numpy(np.concatenate(draft.pending)))
                draft.pending = []
        return perf_counter() - begun

    def _absorb(self, state: SequenceState, hidden: torch.Tensor) -> None:
        cached = self._drafts[state].cached
        self._cache.reserve(cached, cached.length + len(hidden))
        self.exit_model.absorb(hidden, CacheBatch(self._cache, [cached]))


def _roots(
    states: Sequence[SequenceState],
    begun: float | None = None,
    control: ControlRound | None = None,
    num_branches: int = 1,
) -> EesdProposal:
    """The roots alone; ``begun`` if the round is to be measured."""
    roots = chain(torch.tensor([[state.token_ids[-1]] for state in states], dtype=torch.int32))
    times, size = None, len(states)
    if begun is not None:
        times = RoundTimes(begun, perf_counter(), size, size)
    fields = roots.draft_tokens, roots.parents, roots.num_nodes
    return EesdProposal(*fields, None, times, control, num_branches)
