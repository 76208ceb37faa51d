"""Row-invariant ``y = x W^T``: weights streamed once for all rows."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops import registry
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
    workspace: torch.Tensor | None = None,
    *,
    is_gated: bool = False,
) -> torch.Tensor:
    """``x @ weight.T (+ bias) (+ residual)`` with float32 accumulation in a fixed order.

    A row of the result depends on that row of ``x`` alone, to the bit: not on the number of rows,
    the threads or the instruction set.

    Args:
        x: ``[M, K]`` float32; on a GPU bfloat16 or float16, as ``weight``. Rows may be strided.
        weight: ``[N, K]`` float32, bfloat16 or float16, contiguous.
        bias: ``[N]`` float32.
        residual: ``[M, N]`` of ``x``'s dtype, added last; may be ``out``.
        out: ``[M, N]`` of ``x``'s dtype, on a GPU also float32; made if not given.
        workspace: on a GPU, float32 of :func:`linear_workspace` values, zeros before the first
            use; made if not given.
        is_gated: on a GPU, ``weight`` holds rows of gate and of up, eights of each in turn, and
            ``out [M, N / 2]`` is ``silu(gate) * up``.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    if registry.is_on_gpu(x):
        raise NotImplementedError("linear: has no CUDA kernel")
    if is_gated:
        raise ValueError("is_gated: expected False on the CPU")
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    op = torch.ops.specrt.linear if torch.compiler.is_compiling() else _C.linear
    op(x, weight, bias, residual, out)
    return out


def linear_workspace(num_outputs: int, num_inputs: int, num_rows: int) -> int:
    """Float32 values of a workspace on a GPU for weights ``[num_outputs, num_inputs]``."""
    num_tiles, num_slices = -(-num_outputs // 64), 1
    while num_tiles * num_slices < 256 and num_inputs // (2 * num_slices) >= 512:
        num_slices *= 2
    return 0 if num_slices == 1 else num_tiles * 64 * num_slices * min(num_rows, 256) + 512
