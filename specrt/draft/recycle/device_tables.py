"""What sequences have learned, where the logits are: a table each, in slots that stay.

V is the vocabulary's size, R the next tokens kept of each, S the slots there are. A slot takes
36 bytes a token of the vocabulary: 4.6 MB of 128,256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specrt.device import Device
from specrt.draft.recycle.template import NUM_RANKS
from specrt.types import SequenceState


@dataclass(frozen=True, eq=False)
class Slots:
    """Tables at addresses that stay."""

    rows: torch.Tensor
    """``[S, V, R]`` int32: the likeliest next tokens; 0 where nothing is known."""
    is_own: torch.Tensor
    """``[S, V]`` int32: 1 where a row was learned since the sequence began."""
    order: torch.Tensor
    """``[S]`` int32: the slots of a batch's sequences, row by row."""

    @classmethod
    def make(cls, size: int, vocab_size: int, device: Device) -> Slots:
        """Empty ones."""
        rows = device.zeros(size, vocab_size, NUM_RANKS, dtype=torch.int32)
        is_own = device.zeros(size, vocab_size, dtype=torch.int32)
        return cls(rows, is_own, device.zeros(size, dtype=torch.int32))

    def copy_from(self, other: Slots) -> None:
        """Take over a smaller one's tables."""
        size = len(other.rows)
        self.rows[:size].copy_(other.rows)
        self.is_own[:size].copy_(other.is_own)


class DeviceTables:
    """A table for each sequence, and what those that have ended knew.

    Args:
        vocab_size: V.
        device: where they lie.
    """

    def __init__(self, vocab_size: int, device: Device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._known = device.zeros(vocab_size, NUM_RANKS, dtype=torch.int32)
        self._places: dict[SequenceState, int] = {}
        self._free = [0]
        self._order: list[int] = []
        self.slots = Slots.make(1, vocab_size, device)
        """All there are; another object once more were needed."""

    @property
    def is_empty(self) -> bool:
        """Whether no sequence has one."""
        return not self._places

    def open(self, state: SequenceState) -> None:
        """A table of what is known."""
        if state not in self._places:
            if not self._free:
                self._double()
            self._places[state] = self._free.pop()
        place = self._places[state]
        self.slots.rows[place].copy_(self._known)
        self.slots.is_own[place].zero_()

    def close(self, state: SequenceState) -> None:
        """Forget the sequence, but not what it has learned."""
        place = self._places.get(state)
        if place is None:
            return
        is_own = self.slots.is_own[place, :, None] != 0
        self._known = torch.where(is_own, self.slots.rows[place], self._known)
        free = [*self._free, place]
        # Ctrl-C comes behind a call: there is none between these, and no place is lost.
        del self._places[state]
        self._free = free

    def numbers(self, states: Sequence[SequenceState]) -> list[int]:
        """Where the tables of these are."""
        return [self._places[state] for state in states]

    def place(self, states: Sequence[SequenceState]) -> Slots:
        """Have ``order`` name the tables of these."""
        numbers = self.numbers(states)
        if numbers != self._order[: len(numbers)]:
            self._order = []  # until they stand there, if an interrupt comes in between
            host = torch.tensor(numbers, dtype=torch.int32)
            self._device.upload(host, self.slots.order[: len(numbers)])
            self._order = numbers
        return self.slots

    def _double(self) -> None:
        size = len(self.slots.rows)
        larger = Slots.make(2 * size, self._vocab_size, self._device)
        larger.copy_from(self.slots)
        self.slots, self._order = larger, []
        self._free.extend(range(2 * size - 1, size - 1, -1))
