"""Draft control that lives on a device: posteriors, decisions and learning, none of which is read.

The rules, options and signatures are those of ``control.py``, whose rounds keep posteriors on the
host. Here a posterior is a row of one table on the device, and a round's inputs go there as one
copy. All of a round's steps may be run, whatever was decided: a step leaves a sequence that has
stopped as it is, so that ``length`` is right once the last one was run.

Rounds may be launches alone, one behind the other: what is staged for the next one goes up behind
the launches of the one before, so they may share their buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specrt.device import Device
from specrt.draft.length.control import CONTROLLERS, DISCOUNT_PLACE, ControlOptions, Posterior
from specrt.draft.length.costs import DraftCosts
from specrt.draft.length.inputs import HostInputs, RoundInputs
from specrt.ops import draft_control, draft_control_update
from specrt.ops.draft_control import ControlKind, DraftDecision, prior_beliefs
from specrt.types import SequenceState

_FIRST_ROWS = 64


class DeviceControl:
    """The posteriors of a drafter's sequences, on a device.

    Args:
        options: the rule.
        device: where to.
    """

    def __init__(self, options: ControlOptions, device: Device) -> None:
        self.options = options
        self.device = device
        self.kind = ControlKind(CONTROLLERS.index(options.kind))
        settings, self._gain_var = options.settings().tensor(), options.settings().gain_var
        self.settings = device.there(settings)
        self._prior = device.there(prior_beliefs(settings))
        self.beliefs = self._prior.repeat(1 if options.shares else _FIRST_ROWS, 1)
        """``[P, beliefs]`` float64. Where more sequences are open than it has rows a longer one
        takes its place, and the device forgets its captured steps."""
        self._slots: dict[SequenceState, int] = {}
        self._free = list(range(len(self.beliefs)))[::-1]

    def start(self, state: SequenceState) -> None:
        """A sequence joins, with the prior or the shared posterior."""
        if self.options.shares:
            self._slots[state] = 0
            return
        if state not in self._slots:
            if not self._free:
                self._grow()
            free = self._free
            # Ctrl-C comes behind a call: there is none in this line, and no row is lost.
            self._slots[state], self._free = free[-1], free[:-1]
        self.beliefs[self._slots[state]].copy_(self._prior)

    def finish(self, state: SequenceState) -> None:
        """A sequence leaves."""
        slot = self._slots.get(state)
        if slot is None:
            return
        free = self._free if self.options.shares else [*self._free, slot]
        # As in `start`: no call between these.
        del self._slots[state]
        self._free = free

    def slots_of(self, states: Sequence[SequenceState]) -> list[int]:
        """The row of each.

        Raises:
            KeyError: one has not been started.
        """
        return [self._slots[state] for state in states]

    def posterior(self, state: SequenceState) -> Posterior:
        """What is believed of ``state`` now. Waits for the device."""
        row = self.device.read(self.beliefs[self._slots[state]])
        return Posterior.of(row.tolist(), self._gain_var)

    def new_round(self, batch: int, slope: torch.Tensor | None = None) -> DeviceControlRound:
        """Buffers for rounds of ``batch`` sequences.

        Args:
            batch: B.
            slope: ``[2]`` float32 of the calibration head, on the device; None if confidences are
                ``exp(score)``.
        """
        return DeviceControlRound(self, batch, slope)

    def _grow(self) -> None:
        """Twice as many rows."""
        size = len(self.beliefs)
        longer = torch.cat([self.beliefs, self._prior.repeat(size, 1)])
        free = list(range(size, 2 * size))[::-1]
        self.device.forget()  # first: an interrupt must not leave launches over what is gone
        self.beliefs, self._free = longer, free


class DeviceControlRound:
    """One round of a batch. Addresses are fixed; :meth:`decide` and :meth:`launch_update` are
    nothing but launches."""

    def __init__(self, control: DeviceControl, batch: int, slope: torch.Tensor | None) -> None:
        device, cap = control.device, control.options.max_draft
        self._kind, self._slope = int(control.kind), slope
        self._settings, self._num_rounds = control.settings.clone(), 1
        self._discount = control.options.settings().discount
        self._beliefs = control.beliefs
        self._host, self._inputs = HostInputs(batch, cap), RoundInputs.make(batch, device)
        ints = device.zeros(4, batch, dtype=torch.int32)
        self.is_open = ints[0]
        """``[B]`` int32: 1 = draft another token for this sequence."""
        self.drafted = ints[1]
        """``[B]`` int32: tokens drafted that somebody wanted."""
        self.length = ints[2]
        """``[B]`` int32: tokens to verify; one less than drafted where the last was dropped."""
        self.num_nodes = ints[3]
        """``[B]`` int32: of a chain of that length, its root included."""
        self.confidence = device.empty(batch, cap).fill_(torch.nan)
        """``[B, max_draft]`` float32; NaN where nothing was drafted."""

    def stage(
        self,
        control: DeviceControl,
        states: Sequence[SequenceState],
        costs: DraftCosts,
        positions: Sequence[int] | None = None,
        caps: Sequence[int] | None = None,
    ) -> None:
        """Send what the round's decisions depend on; never captured.

        Args:
            control: the one these buffers were made by.
            states: the B sequences. One near its end drafts no more than it can use.
            costs: of this round.
            positions: numbers that no other round of the same seed has; None: the lengths.
            caps: what each drafts at most; None: ``max_draft``.
        """
        self._host.slots[:] = control.slots_of(states)
        self._host.stage(states, costs, positions, caps)
        control.device.upload(self._host.tensors.whole, self._inputs.whole)
        self._beliefs = control.beliefs

    def expect(self, num_rounds: int) -> None:
        """Say how many rounds' forgetting the next update stands for; never captured."""
        if num_rounds != self._num_rounds:
            self._settings[DISCOUNT_PLACE].fill_(self._discount**num_rounds)
            self._num_rounds = num_rounds

    def decide(
        self,
        step: int,
        score: torch.Tensor | None = None,
        evidence: torch.Tensor | None = None,
        *,
        position: torch.Tensor | None = None,
    ) -> None:
        """Decide on the token after the ``step``-th.

        Args:
            step: 0 before anything is drafted, then the number of the token just drafted: each
                once, in order. Sequences that have stopped take no part.
            score: ``[B]`` float32, may be strided: ln of that token's probability.
            evidence: ``[B, 2]`` float32 of the calibration head, or None.
            position: ``[B]`` int32, the histories' lengths where only the device knows them; None:
                as staged.

        Raises:
            ValueError: an argument does not fit.
        """
        draft_control(*self.decision(step, score, evidence, position=position))

    def decision(
        self,
        step: int,
        score: torch.Tensor | None = None,
        evidence: torch.Tensor | None = None,
        *,
        position: torch.Tensor | None = None,
    ) -> DraftDecision:
        """What :meth:`decide` is told, for another launch that decides."""
        at = self._inputs
        return DraftDecision(
            self._kind,
            step,
            self._settings,
            at.costs,
            self._beliefs,
            at.slots,
            at.seed,
            at.position if position is None else position,
            at.limit,
            at.is_sampled,
            self._slope,
            score,
            evidence,
            self.is_open,
            self.drafted,
            self.length,
            self.confidence,
            self.num_nodes,
        )

    def update(
        self,
        control: DeviceControl,
        states: Sequence[SequenceState],
        accept_length: torch.Tensor,
        num_rounds: int = 1,
    ) -> None:
        """Learn from the round that was staged.

        Args:
            control: as staged.
            states: as staged.
            accept_length: ``[B]`` int32 on the device: accepted drafted tokens of each; -1 =
                failed, nothing is learned.
            num_rounds: how many rounds' forgetting this one stands for.

        Raises:
            KeyError: a sequence has finished since.
            ValueError: an argument does not fit.
        """
        staged = self._host.slots.tolist()
        assert control.slots_of(states) == staged, "a round is learned by the rows it was staged of"
        self._beliefs = control.beliefs  # which may have grown since
        self.expect(num_rounds)
        self.launch_update(accept_length)

    def launch_update(self, accept_length: torch.Tensor) -> None:
        """Learn from the round that was staged, by the rows it was staged of.

        Args:
            accept_length: as for :meth:`update`.
        """
        at = self._inputs
        draft_control_update(
            self._kind,
            self._settings,
            at.costs,
            at.slots,
            at.limit,
            self.drafted,
            self.length,
            self.confidence,
            accept_length,
            self._beliefs,
        )
