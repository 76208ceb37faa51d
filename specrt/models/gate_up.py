"""How gate and up lie in their one matrix. I intermediate size."""

from __future__ import annotations

import torch

ROWS_IN_TURN = 8
"""Of gate, and then of up, where they are interleaved: what one thread of ``linear`` holds."""


def interleaved(gate_up: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up in turn, eights of each, as a gated product on a GPU takes them.

    Args:
        gate_up: ``[2I, ...]``, all of gate and then all of up: a matrix, or its bias.

    Returns:
        A copy of that shape.

    Raises:
        ValueError: I is no multiple of 8.
    """
    size, rest = len(gate_up) // 2, gate_up.shape[1:]
    if size % ROWS_IN_TURN:
        raise ValueError(
            f"intermediate_size: expected a multiple of {ROWS_IN_TURN} on CUDA (rows of gate and "
            f"up lie there in eights), got {size}; device='cpu' runs it"
        )
    return gate_up.view(2, -1, ROWS_IN_TURN, *rest).transpose(0, 1).reshape(gate_up.shape)
