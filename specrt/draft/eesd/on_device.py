"""EESD where the host does not wait: as :mod:`specrt.draft.eesd.drafter`, on a GPU.

How many levels are run is decided before any of them is. A level takes a fifth of a plain round or
so, and a draft that is wanted is right more often than not: a level pays where nearly half of the
rounds want it. So as many are run as the mean of what late rounds wanted to verify, and one more,
for the draft that a rule sees and drops, and for texts that have become easier. The controller
decides on the device, after each level, how many its sequence verifies. What the host knows of that
it reads off a round's report.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from specrt.device import Device, Mark
from specrt.draft.base import Budget
from specrt.draft.eesd.costs import RoundTimes
from specrt.draft.eesd.model import ExitModel
from specrt.draft.eesd.round import EesdBuffers, EesdProposal
from specrt.draft.eesd.sequences import REST, REST_FORGOTTEN, ExitSequences, Plan, roots_alone
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.costs import DraftCosts
from specrt.draft.length.device_control import DeviceControl, DeviceControlRound
from specrt.types import AcceptResult, Proposal, SequenceState

_NEWS = 0.1  # weight of a round in how many levels are wanted


class _Marks(NamedTuple):
    """Moments of a proposal, to be compared once all that lies between them is done."""

    begun: Mark
    ended: Mark
    num_rows: int
    """To be verified, of all sequences."""
    batch: int
    caught_up: tuple[Mark, Mark] | None = None
    """Around what a drafted round among drafted ones has not; None of a plain round."""
    steps: tuple[Mark, Mark] | None = None
    num_steps: int = 0
    were_captured: bool = True

    def times(self, device: Device) -> RoundTimes:
        """In seconds since it was begun."""

        def seconds(start: Mark, end: Mark) -> float:
            return 1e-3 * device.ms_between(start, end)

        ended, sizes = seconds(self.begun, self.ended), (self.num_rows, self.batch)
        if self.steps is None or self.caught_up is None:
            return RoundTimes(0.0, ended, *sizes)
        steps, lower = seconds(*self.steps), seconds(self.steps[1], self.ended)
        begun = seconds(*self.caught_up)
        return RoundTimes(begun, ended, *sizes, steps, self.num_steps, lower, self.were_captured)


@dataclass(frozen=True, eq=False)
class _Proposal(EesdProposal):
    """What came of a round on a GPU."""

    marks: _Marks | None = None
    """None where the drafter rests."""
    control: DeviceControlRound | None = None
    """What decides on its lengths, if anybody does."""


class DeviceEesdDrafter(ExitSequences):
    """Drafts with an exit of the target, on a GPU; arguments and trees as of ``EesdDrafter``."""

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
        self.control = DeviceControl(options, self._device)
        # Those that no open proposal has.
        self._controls: defaultdict[tuple[int, bool], list[DeviceControlRound]] = defaultdict(list)
        self._is_known = options.kind == "fixed"
        self._wanted = float(options.draft_len if self._is_known else options.max_draft)
        self._unread: tuple[_Marks, Mark, Mark] | None = None

    # --- the protocol -------------------------------------------------------------------------

    def start(self, state: SequenceState) -> None:
        """Open a sequence in the exit's cache; it takes pages as it grows."""
        self._open(state)
        self.control.start(state)

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> EesdProposal:
        """Run as many levels as are likely to be wanted; how many are verified nobody waits for.

        Raises:
            ValueError: as :meth:`check`, or the budget lends no layers of the exit's target.
            MemoryError: the exit's cache has no pages for a draft.
        """
        lower = self._lent(budget)
        if self._is_resting(budget):
            return self._roots(states)
        begun = self._device.mark()
        plan = self._plan(states, budget, self._num_levels())
        plan = self._make_room(states, plan, lower)
        if not any(plan.caps) or self._is_plain_due(plan):
            return self._roots(states, begun)
        control = None if plan.is_fixed else self._ask(states, plan)
        caught_from = self._device.mark()
        self._catch_up(states)
        caught_up = caught_from, self._device.mark()
        drafts = self._batch_of(states)
        buffers = self._buffers_of(states, lower, drafts, plan)
        buffers.stage(states, lower, drafts)
        return self._draft(buffers, plan, control, (begun, caught_up))

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Commit the accepted path in the exit's cache too, and learn from it."""
        assert isinstance(proposal, _Proposal), "the engine gives back what it was given"
        observed = self._device.mark()
        self._hear(states, proposal.buffers is None, result, taps)
        control = proposal.control
        if control is not None:
            assert result.report is not None, "a GPU's rounds are reported"
            longest = int(result.report.num_nodes.max() - 1) // proposal.num_branches
            self._learn_levels(proposal.num_levels, longest)
            is_idle = longest == 0 and self._weighs_time
            self._rest_left = REST - 1 if is_idle else 0
            num_rounds = REST_FORGOTTEN if is_idle else 1
            control.update(self.control, states, result.accept_length, num_rounds)
            self._controls[len(states), proposal.num_branches == 1].append(control)
        self._measure(proposal.marks, observed)

    def finish(self, state: SequenceState) -> None:
        """Free the sequence's pages."""
        self.control.finish(state)
        self._close(state)

    # --- how many levels ----------------------------------------------------------------------

    def _num_levels(self) -> int:
        """To be run, where nobody says how many."""
        if self._is_known:
            return self._options.draft_len
        return min(self._options.max_draft, 1 + math.ceil(self._wanted))

    def _learn_levels(self, num_run: int, longest: int) -> None:
        """Of ``num_run`` levels the sequence that wanted most was to verify ``longest``."""
        # All of a few, near the end of texts say, is no news.
        if longest < num_run or longest > self._wanted:
            self._wanted += _NEWS * (longest - self._wanted)

    # --- a round ------------------------------------------------------------------------------

    def _ask(self, states: Sequence[SequenceState], plan: Plan) -> DeviceControlRound:
        """A controller, told of the round and asked who is to draft at all."""
        is_chain = plan.num_branches == 1
        unused = self._controls[len(states), is_chain]
        slope = self.exit_model.slope if is_chain else None
        control = unused.pop() if unused else self.control.new_round(len(states), slope)
        control.stage(self.control, states, self.costs(len(states)), caps=plan.caps)
        control.decide(0)
        return control

    def _draft(
        self,
        buffers: EesdBuffers,
        plan: Plan,
        control: DeviceControlRound | None,
        before: tuple[Mark, tuple[Mark, Mark]],
    ) -> EesdProposal:
        """Run level after level; all nodes are proposed, and how many of them are to be verified is
        known on the device."""
        most, started, were_captured = max(plan.caps), self._device.mark(), True
        for level in range(most):
            if level > 0:
                buffers.stage_level(level)
            were_captured &= self._run(buffers, level, partial(buffers.draft, level, self._cache))
            if control is not None:
                control.decide(level + 1, *buffers.said(level))
        stepped = self._device.mark()
        buffers.stage_level(most)
        were_captured &= self._run(buffers, -most, partial(buffers.close, most, self._cache))
        tokens, parents = buffers.run.staged(1 + most * plan.num_branches)
        lengths = self._there(plan.caps) if control is None else control.length
        begun, caught_up = before
        marks = _Marks(
            begun,
            self._device.mark(),
            tokens.numel(),
            len(plan.caps),
            caught_up,
            (started, stepped),
            most,
            were_captured,
        )
        fields = tokens, parents, 1 + lengths * plan.num_branches
        return _Proposal(*fields, None, plan.num_branches, buffers, most, marks, control)

    def _there(self, values: Sequence[int]) -> torch.Tensor:
        return self._device.there(torch.tensor(values, dtype=torch.int32))

    def _roots(self, states: Sequence[SequenceState], begun: Mark | None = None) -> EesdProposal:
        """The roots alone; ``begun`` if the round is to be measured."""
        roots, marks, size = roots_alone(states), None, len(states)
        if begun is not None:
            marks = _Marks(begun, self._device.mark(), size, size)
        return _Proposal(roots.draft_tokens, roots.parents, roots.num_nodes, marks=marks)

    def _measure(self, marks: _Marks | None, observed: Mark) -> None:
        """Take the times of the round before, all of which is done now."""
        if self._given_costs is not None:
            return
        if self._unread is not None:
            last, heard, learned = self._unread
            times = [1e-3 * self._device.ms_between(last.begun, end) for end in (heard, learned)]
            self._meter.observe(last.times(self._device), *times)
        self._unread = None if marks is None else (marks, observed, self._device.mark())
