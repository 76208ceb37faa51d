"""EESD: the target drafts for itself, with its first N layers and one trained exit layer.

A round runs the root, then drafted token after drafted token, through the target's own first N
layers, the exit layer and the head; after each a controller decides whether the next one will pay.
Verification takes the nodes up at layer N, so the first N layers run once for every token, with one
cache (arXiv 2406.03853, section 3). Drafts are deterministic, or coupled to the target's noise, and
accepted by equality: a controller may therefore stop, or drop a draft, for whatever reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch

from specrt.draft.base import Budget
from specrt.draft.eesd.costs import RoundTimes
from specrt.draft.eesd.model import ExitModel
from specrt.draft.eesd.round import EesdBuffers, EesdProposal
from specrt.draft.eesd.sequences import REST, REST_FORGOTTEN, ExitSequences, Plan, roots_alone
from specrt.draft.length.control import ControlOptions, ControlRound, DraftControl
from specrt.draft.length.costs import DraftCosts
from specrt.types import AcceptResult, Proposal, SequenceState


@dataclass(frozen=True, eq=False)
class _Proposal(EesdProposal):
    """What came of a round on the CPU."""

    times: RoundTimes | None = None
    """None where the drafter rests: nothing is measured, and no controller was asked."""
    control: ControlRound | None = None
    """What decided on its length, if anybody did."""


class EesdDrafter(ExitSequences):
    """Drafts with an exit of the target, on the CPU.

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
        options = control or ControlOptions()
        super().__init__(exit_model, options, is_coupled, costs)
        self.control = DraftControl(options)
        # Those that no open proposal has.
        self._controls: defaultdict[tuple[int, bool], list[ControlRound]] = defaultdict(list)

    # --- the protocol -------------------------------------------------------------------------

    def start(self, state: SequenceState) -> None:
        """Open a sequence in the exit's cache; it takes pages as it grows."""
        self._open(state)
        self.control.start(state)

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> EesdProposal:
        """Draft while the controller goes on.

        Raises:
            ValueError: as :meth:`check`, or the budget lends no layers of the exit's target.
            MemoryError: the exit's cache has no pages for a draft.
        """
        lower = self._lent(budget)
        if self._is_resting(budget):
            return _roots(states)
        begun = perf_counter()
        plan = self._plan(states, budget, self.control.options.max_draft)
        plan = self._make_room(states, plan, lower)
        if not any(plan.caps) or self._is_plain_due(plan):
            return _roots(states, begun)
        control = None if plan.is_fixed else self._ask(states, plan)
        if control is not None and not self._is_any_open(control, plan, 0):
            self._rest_left = REST - 1 if self._weighs_time else 0
            return _roots(states, begun, control, plan.num_branches)
        caught_from = perf_counter()
        self._catch_up(states)
        begun += perf_counter() - caught_from  # not what a drafted round among others takes
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
        assert isinstance(proposal, _Proposal), "the engine gives back what it was given"
        observed, is_plain = perf_counter(), proposal.buffers is None
        self._hear(states, is_plain, result, taps)
        control = proposal.control
        if control is not None:
            num_rounds = REST_FORGOTTEN if is_plain and self._weighs_time else 1
            control.update(self.control, states, result.lengths, num_rounds)
            self._controls[len(states), proposal.num_branches == 1].append(control)
        if proposal.times is not None and self._given_costs is None:
            self._meter.observe(proposal.times, observed, perf_counter())

    def finish(self, state: SequenceState) -> None:
        """Free the sequence's pages."""
        self.control.finish(state)
        self._close(state)

    # --- a round ------------------------------------------------------------------------------

    def _ask(self, states: Sequence[SequenceState], plan: Plan) -> ControlRound:
        """A controller, asked who is to draft at all."""
        is_chain = plan.num_branches == 1
        unused = self._controls[len(states), is_chain]
        slope = self.exit_model.slope if is_chain else None
        control = unused.pop() if unused else self.control.new_round(len(states), slope)
        control.stage(self.control, states, self.costs(len(states)))
        control.decide(0, None, None)
        return control

    def _draft(
        self, buffers: EesdBuffers, plan: Plan, control: ControlRound | None, begun: float
    ) -> EesdProposal:
        """Run level after level, and propose those that are to be verified."""
        most, level = max(plan.caps), 0
        started, were_captured = perf_counter(), True
        while level < most:
            if level > 0:
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
        counts = [1 + length * plan.num_branches for length in lengths]
        tokens, parents = buffers.run.staged(max(counts))
        num_nodes = torch.from_numpy(np.array(counts, dtype=np.int32))
        sizes, steps = (tokens.numel(), len(lengths)), stepped - started
        times = RoundTimes(begun, perf_counter(), *sizes, steps, level, lower, were_captured)
        fields = tokens, parents, num_nodes
        return _Proposal(*fields, None, plan.num_branches, buffers, level, times, control)

    def _goes_on(self, control: ControlRound, buffers: EesdBuffers, plan: Plan, level: int) -> bool:
        """Tell the controller of the drafts just made; whether a sequence wants more."""
        control.decide(level, *buffers.said(level - 1))
        return self._is_any_open(control, plan, level)

    def _is_any_open(self, control: ControlRound, plan: Plan, level: int) -> bool:
        """Whether a sequence is to draft on; those at their cap are closed."""
        for row, cap in enumerate(plan.caps):
            if cap <= level:
                control.is_open[row] = 0
        return 1 in control.is_open.tolist()


def _roots(
    states: Sequence[SequenceState],
    begun: float | None = None,
    control: ControlRound | None = None,
    num_branches: int = 1,
) -> EesdProposal:
    """The roots alone; ``begun`` if the round is to be measured."""
    roots, times, size = roots_alone(states), None, len(states)
    if begun is not None:
        times = RoundTimes(begun, perf_counter(), size, size)
    fields = roots.draft_tokens, roots.parents, roots.num_nodes
    return _Proposal(*fields, None, num_branches, times=times, control=control)
