"""Proposals of several groups of a batch, as one of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specrt.device import Device
from specrt.types import Proposal


class Merged:
    """Proposals of several groups, row by row; a row that nobody takes is its root alone.

    They lie on the host as long as all that were taken do, for then it knows their sizes.
    """

    def __init__(self, batch: int, vocab_size: int, device: Device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._ints = torch.zeros(2, batch, 1, dtype=torch.int32)
        self._num_nodes = torch.ones(batch, dtype=torch.int32)
        self._probs: torch.Tensor | None = None

    def take(self, rows: Sequence[int], proposal: Proposal) -> None:
        """Copy a group's proposal into its rows; one that cannot be copied leaves roots alone."""
        here, probs = self._beside(proposal), proposal.draft_probs
        size = here.draft_tokens.shape[1]
        self._ints = _padded(self._ints, size, dim=2)
        counts = here.num_nodes.clamp(max=size)
        for place, row in enumerate(rows):
            self._ints[0, row, :size].copy_(here.draft_tokens[place])
            self._ints[1, row, :size].copy_(here.parents[place])
        for place, row in enumerate(rows):
            self._num_nodes[row].copy_(counts[place])
        if probs is not None and probs.shape[2] == self._vocab_size:
            self._take_probs(rows, self._device.there(probs))

    def proposal(self) -> Proposal:
        """Of the whole batch."""
        tokens, parents = self._ints
        probs = self._probs
        if probs is not None:
            probs = _padded(probs, tokens.shape[1], dim=1)
        return Proposal(tokens, parents, self._num_nodes, probs)

    def _beside(self, proposal: Proposal) -> Proposal:
        """``proposal`` where this one lies, which may move from the host to the device."""
        device = self._device
        if device.holds(proposal.draft_tokens) and not device.holds(self._ints):
            self._ints = device.there(self._ints)
            self._num_nodes = device.there(self._num_nodes)
        if device.holds(proposal.draft_tokens) or not device.holds(self._ints):
            return proposal
        fields = proposal.draft_tokens, proposal.parents, proposal.num_nodes
        return Proposal(*map(device.there, fields))

    def _take_probs(self, rows: Sequence[int], probs: torch.Tensor) -> None:
        """Laws; rows of others are none, as zeros are none."""
        size = probs.shape[1]
        if self._probs is None:
            self._probs = self._device.zeros(len(self._num_nodes), size, self._vocab_size)
        self._probs = _padded(self._probs, size, dim=1)
        for place, row in enumerate(rows):
            self._probs[row, :size].copy_(probs[place])


def _padded(table: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """``table`` with at least ``size`` entries in a dimension, zeros behind."""
    missing = max(0, size - table.shape[dim])
    behind = [0, 0] * (table.dim() - 1 - dim) + [0, missing]
    return torch.nn.functional.pad(table, behind) if missing else table
