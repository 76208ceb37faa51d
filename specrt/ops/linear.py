"""Row-invariant weight-streaming ``y = x W^T``."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()",
    _C.linear,
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T (+ bias) (+ residual)`` with float32 accumulation in a fixed order.

    A row of the result depends on that row of ``x`` alone, to the bit: not on the number of rows,
    the threads or the instruction set.

    Args:
        x: ``[M, K]`` float32; rows may be strided.
        weight: ``[N, K]`` float32, bfloat16 or float16, contiguous.
        bias: ``[N]`` float32.
        residual: ``[M, N]`` float32, added last; may be ``out``.
        out: ``[M, N]`` float32; made if not given.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    if torch.compiler.is_compiling():
        torch.ops.specrt.linear(x, weight, bias, residual, out)
    else:
        _C.linear(x, weight, bias, residual, out)
    return out
