"""What ``ops.tree_expand`` asks of a drafter: scratch, and the noise the target will draw with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy.typing as npt
import torch

from specrt.device import Device
from specrt.ops.linear import TILE_TOKENS
from specrt.ops.tree_build import expand_gpu_workspace_size, expand_workspace_size
from specrt.types import SequenceState

ROW_WORDS = 8
"""int64 words of a row of sampling."""


class Coupling(NamedTuple):
    """Static buffers of B sequences: what ``ops.tree_expand`` reads for coupled ranking."""

    sampling: torch.Tensor
    """``[B, 8]`` int64: the rows that acceptance reads."""
    position: torch.Tensor
    """``[B]`` int32: where the root's children stand."""


def write_sampling(
    states: Sequence[SequenceState], sampling: npt.NDArray[Any], position: npt.NDArray[Any]
) -> None:
    """Write what a :class:`Coupling` holds; a root's child takes position ``len(token_ids)``.

    Args:
        states: B sequences.
        sampling: ``[B, 8]`` int64, written.
        position: ``[B]`` int32, written.
    """
    for index, state in enumerate(states):
        assert state.sampling_row is not None, "a sequence without its row of sampling"
        sampling[index] = state.sampling_row.numpy()
        position[index] = len(state.token_ids)


def expand_scratch(
    batch: int, num_nodes: int, num_tokens: int, num_children: int, device: Device
) -> torch.Tensor:
    """Its workspace there.

    Args:
        batch: B sequences.
        num_nodes: that one call expands of each.
        num_tokens: of a row of logits.
        num_children: kept of each sequence.
        device: where the logits are.
    """
    if device.is_gpu:
        return device.zeros(expand_gpu_workspace_size(batch, num_nodes, num_tokens, num_children))
    num_parts = max(1, min(batch * num_nodes, torch.get_num_threads()))
    return device.empty(num_parts, expand_workspace_size(num_tokens))


def draft_tiles(
    num_rows: int, num_tokens: int, device: Device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the keys and masses of ``ops.DraftMaxima``.

    Args:
        num_rows: of logits, at most.
        num_tokens: of a row.
        device: where they are, a GPU.
    """
    tiles = num_rows, -(-num_tokens // TILE_TOKENS)
    return device.zeros(*tiles, dtype=torch.int64), device.zeros(*tiles)
