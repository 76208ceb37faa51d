"""Gated activation of the MLP."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register("silu_mul(Tensor gate_up, Tensor(a!) out) -> ()", _C.silu_mul)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up``, element by element, computed in float32.

    Args:
        gate_up: ``[M, 2 I]`` float32, bfloat16 or float16, gate then up in each row; rows may be
            strided.
        out: ``[M, I]`` of the same dtype; made if not given. May be the gate half itself.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    if out is None:
        *rows, width = gate_up.shape or (0,)
        out = gate_up.new_empty(*rows, width // 2)
    if torch.compiler.is_compiling():
        torch.ops.specrt.silu_mul(gate_up, out)
    else:
        _C.silu_mul(gate_up, out)
    return out
