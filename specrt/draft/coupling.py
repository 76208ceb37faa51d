"""What a drafter needs to rank candidates with the noise the target will draw with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from specrt.types import SequenceState


class Coupling(NamedTuple):
    """Static buffers of B sequences: what ``ops.tree_expand`` reads for coupled ranking."""

    sampling: torch.Tensor
    """``[B, 8]`` int64: the rows that acceptance reads."""
    position: torch.Tensor
    """``[B]`` int32: where the root's children stand."""

    @classmethod
    def make(cls, batch: int) -> Coupling:
        """Empty buffers."""
        rows = torch.zeros(batch, 8, dtype=torch.int64)
        return cls(rows, torch.zeros(batch, dtype=torch.int32))

    def stage(self, states: Sequence[SequenceState]) -> None:
        """Copy the sequences' sampling in; the root's child takes position ``len(token_ids)``."""
        rows, position = self.sampling.numpy(), self.position.numpy()
        for index, state in enumerate(states):
            assert state.sampling_row is not None, "a sequence without its row of sampling"
            rows[index] = state.sampling_row.numpy()
            position[index] = len(state.token_ids)
