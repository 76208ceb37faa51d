"""What a drafter needs to rank candidates with the noise the target will draw with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specrt.ops.tree_build import CoupledNoise
from specrt.types import SequenceState


def make_noise(batch: int) -> CoupledNoise:
    """Static buffers for B sequences."""
    dtypes = (torch.int64, torch.int32, torch.float32, torch.int32, torch.float64, torch.float32)
    return CoupledNoise(*(torch.zeros(batch, dtype=dtype) for dtype in dtypes))


def stage_noise(noise: CoupledNoise, states: Sequence[SequenceState]) -> None:
    """Copy the sequences' sampling in; the root's child takes position ``len(token_ids)``."""
    for row, state in enumerate(states):
        seed = state.seed % 2**64
        noise.seed[row] = seed - 2**64 if seed >= 2**63 else seed
        noise.position[row] = len(state.token_ids)
        noise.temperature[row] = state.temperature
        noise.top_k[row] = state.top_k
        noise.top_p[row] = state.top_p
        noise.min_p[row] = state.min_p
