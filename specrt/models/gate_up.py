"""How gate and up lie in their one matrix, and the product by it.

H hidden size, I intermediate size, M rows.
"""

from __future__ import annotations

import torch

from specrt import ops

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


def launch_gated(
    x: torch.Tensor,
    gate_up: ops.Matrix,
    bias: torch.Tensor | None,
    between: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    *,
    is_interleaved: bool,
    is_open: torch.Tensor | None = None,
) -> None:
    """``out = silu(gate @ x) * (up @ x)``, row by row: one launch where they are interleaved.

    Args:
        x: ``[M, H]``
        gate_up: ``[2I, H]``
        bias: ``[2I]`` in the order of ``gate_up``, or None.
        between: ``[M, 2I]``, scratch; of any width where they are interleaved.
        out: ``[M, I]``, written.
        workspace: of ``linear`` on a GPU.
        is_interleaved: how ``gate_up`` and ``bias`` lie.
        is_open: as for ``ops.linear``.
    """
    if is_interleaved:
        ops.linear(x, gate_up, bias, None, out, workspace, is_gated=True, is_open=is_open)
        return
    ops.linear(x, gate_up, bias, None, between, workspace, is_open=is_open)
    ops.silu_mul(between, out=out)
