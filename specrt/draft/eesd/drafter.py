"""EESD: the target drafts for itself, with its first N layers and one trained exit layer.

A round runs the root, then drafted token after drafted token, through the target's own first N
layers, the exit layer and the head; after each a controller decides whether the next one will pay.
Verification takes the nodes up at layer N, so the first N layers run once for every token, with one
cache (arXiv 2406.03853, section 3). Drafts are deterministic, or coupled to the target's noise, and
accepted by equality: a controller may therefore stop, or drop a draft, for whatever reason.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from specrt.cache import CacheBatch, CachedSequence, KVCache
from specrt.draft.base import Budget, DraftParams
from specrt.draft.eesd.costs import CostMeter
from specrt.draft.eesd.model import ExitModel
from specrt.draft.eesd.round import MAX_DRAFT_NODES, Chain, EesdBuffers, EesdKey
from specrt.draft.length.control import ControlOptions, ControlRound, DraftControl
from specrt.draft.length.costs import DraftCosts
from specrt.models.model import StepRunner, run_eagerly
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


class _Times(NamedTuple):
    begun: float
    steps: float
    """Seconds of all draft steps."""
    lower: float | None
    """Seconds of the last nodes' first N layers."""
    num_steps: int
    are_known: bool
    ended: float


class EesdDrafter:
    """Drafts with an exit of the target.

    :class:`DraftParams`: ``depth`` fixes the number of drafted levels (one more than ``depth``),
    ``top_k`` makes a tree of so many branches (by default a chain), ``total_tokens`` bounds it.

    Args:
        exit_model: the exit, which knows its target.
        control: how long to draft.
        run_step: how its steps run.
        is_coupled: rank candidates with the noise the target will draw with, where the temperature
            is above 0. Moves trees, never tokens.
        costs: of a round's parts, in place of measured ones (which differ from run to run).
    """

    def __init__(
        self,
        exit_model: ExitModel,
        control: ControlOptions | None = None,
        run_step: StepRunner = run_eagerly,
        *,
        is_coupled: bool = True,
        costs: DraftCosts | None = None,
    ) -> None:
        self.exit_model = exit_model
        self.taps: tuple[str, ...] = (exit_model.tap,)
        self.is_coupled = is_coupled
        self.control = DraftControl(control or ControlOptions())
        self._run_step = run_step
        self._cache = exit_model.new_cache()
        self._drafts: dict[SequenceState, _Draft] = {}
        self._buffers: Recent[EesdKey, EesdBuffers] = Recent(_MAX_ROUNDS)
        self._controls: dict[tuple[int, bool], ControlRound] = {}
        self._captured = WeakKeyDictionary[EesdBuffers, set[Hashable]]()
        self._captured_version = exit_model.version
        self._batch = CacheBatch(self._cache)
        self._meter = CostMeter(exit_model)
        self._given_costs = costs
        self._rest_left = 0
        self._weighs_time = costs is None and self.control.options.kind == "cost-aware"
        self._controlled: ControlRound | None = None
        self._times: _Times | None = None
        self._last: tuple[EesdBuffers, int] | None = None
        self._num_rows = self._batch_size = 0

    @property
    def last_chain(self) -> Chain:
        """What the steps of the last proposal, a chain, said, dropped drafts included.

        Raises:
            ValueError: nothing was drafted, or a tree.
        """
        if self._last is None or self._last[0].key.num_branches != 1:
            raise ValueError("last_chain: the last proposal was no chain")
        buffers, num_levels = self._last
        return buffers.chain(num_levels)

    def costs(self, batch: int = 1) -> DraftCosts:
        """Milliseconds of a round's parts, as given or as measured so far."""
        return self._given_costs or self._meter.costs(batch)

    # --- the protocol -------------------------------------------------------------------------

    def check(self, params: DraftParams) -> None:
        """Whether a round's buffers have room for such trees.

        Raises:
            ValueError: ``depth`` and ``top_k`` ask for more than 62 drafted nodes, or ``top_k`` for
                more than the vocabulary.
        """
        width, vocab_size = params.top_k or 1, self.exit_model.target.config.vocab_size
        if width > vocab_size:
            raise ValueError(f"top_k: expected at most the vocabulary {vocab_size}, got {width}")
        asked = 1 if params.depth is None else params.depth + 1
        if asked * width > MAX_DRAFT_NODES:
            raise ValueError(
                f"depth, top_k: expected at most {MAX_DRAFT_NODES} drafted nodes, "
                f"got {asked} levels of {width}"
            )

    def start(self, state: SequenceState) -> None:
        """Reserve pages in the exit's cache."""
        cached = self._cache.open(state.max_len + MAX_NODES)
        self._drafts[state] = _Draft(cached, [])
        self.control.start(state)

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """Run the exit's keys and values for a piece of the prompt."""
        self._absorb(state, taps[self.exit_model.tap][0])

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """Draft while the controller goes on.

        Raises:
            ValueError: as :meth:`check`, or the budget has no cache of the model whose layers the
                exit runs.
        """
        target = budget.target_batch
        if target is None or not self.exit_model.target.owns(target.cache):
            raise ValueError(
                "drafter: expected an engine of the very target that this EESD drafter was loaded "
                f"for, got {'none' if target is None else 'another'}"
            )
        self._controlled = self._times = self._last = None
        if self._rest_left > 0 and budget.params == DraftParams():
            self._rest_left -= 1
            return _roots(states)
        self._batch_size = len(states)
        begun = perf_counter()
        plan = self._plan(states, budget)
        if not any(plan.caps) or not self._wants_draft(states, plan):
            return self._timed(_roots(states), begun)
        begun += self._catch_up(states)
        drafts = self._batch_of(states)
        buffers = self._buffers_of(states, target, drafts, plan)
        buffers.stage(states, target, drafts)
        lengths = self._draft(buffers, plan, (target, drafts), begun)
        return self._timed(buffers.tree(lengths), begun)

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Commit the accepted path in the exit's cache too, and learn from it."""
        if self._times is None:  # resting
            self._keep_roots(states, taps)
            return
        begun = perf_counter()
        is_plain = self._times.num_steps == 0
        if is_plain:
            self._keep_roots(states, taps)
        else:
            self._batch_of(states).commit(result.path, result.accept_length + 1)
        if self._controlled is not None:
            num_rounds = _REST_FORGOTTEN if is_plain and self._weighs_time else 1
            lengths = result.accept_length.tolist()
            self._controlled.update(self.control, states, lengths, num_rounds)
        self._measure(begun)

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
        wanted = self.control.options.max_draft if params.depth is None else params.depth + 1
        total = min(params.total_tokens or MAX_NODES, budget.max_nodes, 1 + MAX_DRAFT_NODES)
        width = min(width, max(1, total - 1))  # a narrower level rather than none
        most = min(wanted, (total - 1) // width)
        # The bonus token takes the last place.
        caps = [max(0, min(most, state.num_left - 1)) for state in states]
        return _Plan(width, caps, is_fixed)

    def _wants_draft(self, states: Sequence[SequenceState], plan: _Plan) -> bool:
        """Whether any sequence is to draft at all."""
        if plan.is_fixed:
            return True
        if self._weighs_time and self._meter.is_plain_due():
            return False
        key = len(states), plan.num_branches == 1
        control = self._controls.get(key)
        if control is None:
            slope = self.exit_model.slope if plan.num_branches == 1 else None
            control = self._controls[key] = self.control.new_round(len(states), slope)
        control.stage(self.control, states, self.costs(len(states)))
        control.decide(0, None, None)
        self._controlled = control
        is_wanted = self._is_any_open(control, plan, 0)
        if self._weighs_time and not is_wanted:
            self._rest_left = _REST - 1
        return is_wanted

    def _draft(
        self,
        buffers: EesdBuffers,
        plan: _Plan,
        batches: tuple[CacheBatch, CacheBatch],
        begun: float,
    ) -> list[int]:
        """Run level after level; how many of each sequence to verify."""
        caches = batches[0].cache, batches[1].cache
        most, control = max(plan.caps), self._controlled
        started, are_known, level = perf_counter(), True, 0
        while level < most:
            buffers.embed(level)
            step = partial(buffers.draft, level, *caches)
            are_known &= self._run(buffers, level, step, caches)
            level += 1
            if control is not None and not self._goes_on(control, buffers, plan, level):
                break
        stepped = perf_counter()
        lengths = [min(cap, level) for cap in plan.caps]
        if control is not None:
            lengths = control.length.tolist()
        lower = None
        if max(lengths) == level:
            buffers.embed(level)
            close = partial(buffers.close, level, *caches)
            are_known &= self._run(buffers, -level, close, caches)
            lower = perf_counter() - stepped
        self._last = buffers, level
        self._times = _Times(begun, stepped - started, lower, level, are_known, 0.0)
        return lengths

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

    def _run(
        self,
        buffers: EesdBuffers,
        step: int,
        launch: Callable[[], None],
        caches: tuple[KVCache, KVCache],
    ) -> bool:
        """Run a step of ``buffers``; whether it had been run, and so captured, before.

        Engines that share the drafter have target caches of their own.
        """
        version = self.exit_model.version
        if version != self._captured_version:
            self._captured.clear()  # all are stale, and would keep the caches of gone engines
            self._captured_version = version
        key = (caches, step, version)
        captured = self._captured.setdefault(buffers, set())
        is_known = key in captured
        captured.add(key)
        # A graph holds addresses of all of these; as part of its key they outlive it.
        self._run_step((self, buffers, *key), launch)
        return is_known

    # --- sequences and buffers ----------------------------------------------------------------

    def _batch_of(self, states: Sequence[SequenceState]) -> CacheBatch:
        return self._batch.update([self._drafts[state].cached for state in states])

    def _buffers_of(
        self,
        states: Sequence[SequenceState],
        target: CacheBatch,
        drafts: CacheBatch,
        plan: _Plan,
    ) -> EesdBuffers:
        is_coupled = self.is_coupled and any(state.temperature > 0 for state in states)
        widths = target.block_table.shape[1], drafts.block_table.shape[1]
        key = EesdKey(len(states), *widths, plan.num_branches, is_coupled)
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
            self._drafts[state].pending.append(hidden[row].copy())

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
        self.exit_model.absorb(hidden, CacheBatch(self._cache, [self._drafts[state].cached]))

    # --- times --------------------------------------------------------------------------------

    def _timed(self, tree: Proposal, begun: float) -> Proposal:
        """Note when a proposal ended."""
        self._num_rows = tree.draft_tokens.numel()
        ended = perf_counter()
        if self._times is None:
            self._times = _Times(begun, 0.0, None, 0, True, ended)
        else:
            self._times = self._times._replace(ended=ended)
        return tree

    def _measure(self, observed: float) -> None:
        """Take the round's times; ``observed`` is when its outcome came."""
        times = self._times
        if times is None or self._given_costs is not None:
            return
        verify_ms = 1e3 * (observed - times.ended)
        if times.num_steps == 0:
            self._meter.observe_plain(verify_ms)
            return
        self._meter.observe_verify(self._num_rows, self._batch_size, verify_ms)
        if not times.are_known:
            return
        drafting = times.steps + (times.lower or 0.0)
        fixed = times.ended - times.begun - drafting + perf_counter() - observed
        lower = None if times.lower is None else 1e3 * times.lower
        self._meter.observe_draft(1e3 * times.steps / times.num_steps, 1e3 * fixed, lower)


def _roots(states: Sequence[SequenceState]) -> Proposal:
    return chain(torch.tensor([[state.token_ids[-1]] for state in states], dtype=torch.int32))
