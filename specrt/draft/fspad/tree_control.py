"""How deep each sequence's tree grows, decided on the device after each level.

The rules are a chain's (:mod:`specrt.draft.length.device_control`): what a chain's controller sees
of a token, a tree's sees of a level, the chance that the accepted path goes on into it, given that
it came so far. All levels are launched; one that no sequence wants streams nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from specrt import ops
from specrt.device import Device
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.costs import DraftCosts
from specrt.draft.length.device_control import DeviceControl, DeviceControlRound
from specrt.types import RoundReport, SequenceState

_REST = 16  # rounds without drafts, behind one in which nobody wanted any
_REST_FORGOTTEN = 4  # rounds' forgetting that a rest stands for


class TreeControl:
    """The controllers of a drafter's sequences.

    Args:
        options: the rule; ``max_draft`` counts levels.
        device: where to.
    """

    def __init__(self, options: ControlOptions, device: Device) -> None:
        self.max_levels = options.max_draft
        self._control = DeviceControl(options, device)
        self._weighs_time = options.kind == "cost-aware"
        self._rounds: dict[int, DeviceControlRound] = {}  # by the number of sequences
        self._rest_left = 0
        self._has_rested = False

    def start(self, state: SequenceState) -> None:
        """A sequence joins."""
        self._control.start(state)

    def finish(self, state: SequenceState) -> None:
        """A sequence leaves, or has left."""
        self._control.finish(state)

    def rests(self) -> bool:
        """Whether the next round drafts nothing, as nobody wanted to of late."""
        if self._rest_left == 0:
            return False
        self._rest_left -= 1
        self._has_rested = True
        return True

    def staged(self, states: Sequence[SequenceState], costs: DraftCosts) -> DeviceControlRound:
        """A round that decides for ``states``, told what it depends on."""
        size = len(states)
        if size not in self._rounds:
            self._rounds[size] = self._control.new_round(size)
        made = self._rounds[size]
        made.stage(self._control, states, costs)
        made.expect(_REST_FORGOTTEN if self._has_rested else 1)
        self._has_rested = False
        return made

    def hear(self, report: RoundReport) -> None:
        """What came of a round that was decided here."""
        if self._weighs_time and int(report.num_nodes.max()) == 1:
            self._rest_left = _REST


class LevelControl(NamedTuple):
    """Who decides in a launched round, behind each of its levels."""

    control: DeviceControlRound
    position: torch.Tensor
    """``[B]`` int32: the histories' lengths."""

    def begin(self) -> None:
        """Decide on the first level; nothing but a launch."""
        self.control.decide(0, position=self.position)

    def after(self, level: int, score: torch.Tensor) -> ops.DraftDecision:
        """What decides on the level behind ``level`` (0: the root's children).

        Args:
            level: that the same launch scores.
            score: ``[B]`` float32 that it writes: of the level.
        """
        return self.control.decision(1 + level, score, position=self.position)
