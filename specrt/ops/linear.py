"""Row-invariant ``y = x W^T``: weight-streaming on the CPU, cuBLAS through torch on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from specrt import _C
from specrt.ops import registry
from specrt.ops.gemm_settings import GemmSettings
from specrt.ops.registry import register

register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()",
    _C.linear,
)

GEMM_ROWS = 128
"""Rows of every GEMM on a GPU: cuBLAS picks its algorithm by them, and with it a row's bits.

128 holds the largest tree of one sequence, and the weights are streamed once for all of its rows;
fewer rows would hardly be faster, for a GEMM of up to 180 rows or so is bound by that streaming.
"""

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""``(x [128, K], weight [N, K], out [128, N] float32)``: the bare product."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T (+ bias) (+ residual)`` with float32 accumulation in a fixed order.

    A row of the result depends on that row of ``x`` alone, to the bit: not on the number of rows,
    the threads or the instruction set.

    On a GPU this is cuBLAS on exactly 128 rows at a time, always at the same addresses of
    ``workspace``, so that nothing it chooses by can depend on the number of rows. That all of the
    128 rows are summed in one order is how its kernels work, not a promise of theirs: the GPU tests
    look. What else it chooses by are settings of torch's, which must stay as they are and be of
    those that :class:`~specrt.ops.gemm_settings.GemmSettings` accepts: checked here if no workspace
    is given, else by whoever made it. Its sums are float32; of float32 operands the bits follow
    ``allow_tf32``.

    Args:
        x: ``[M, K]`` float32; on a GPU also bfloat16 or float16, as ``weight``. Rows may be
            strided.
        weight: ``[N, K]`` float32, bfloat16 or float16, contiguous.
        bias: ``[N]`` float32.
        residual: ``[M, N]`` of ``x``'s dtype, added last; may be ``out``.
        out: ``[M, N]`` of ``x``'s dtype, on a GPU also float32; made if not given.
        workspace: on a GPU, uint8 of :func:`linear_workspace` bytes; made if not given.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named. On a GPU,
            a setting of torch's under which rows might depend on one another.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    if registry.is_on_gpu(x):
        if workspace is None and not torch.compiler.is_compiling():
            GemmSettings.current(x.dtype)
        check_gpu_linear(x, weight, bias, residual, out)
        linear_in_pieces(x, weight, bias, residual, out, workspace, gpu_product)
    elif torch.compiler.is_compiling():
        torch.ops.specrt.linear(x, weight, bias, residual, out)
    else:
        _C.linear(x, weight, bias, residual, out)
    return out


def linear_workspace(num_outputs: int, num_inputs: int) -> int:
    """Bytes of a workspace on a GPU for weights of at most ``[num_outputs, num_inputs]``."""
    widest = torch.float32.itemsize
    return GEMM_ROWS * (num_outputs + num_inputs) * widest


def linear_in_pieces(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    product: Product,
) -> None:
    """:func:`linear` by a product of 128 rows; the others hold what was left there.

    Args:
        x, weight, bias, residual, out, workspace: as for :func:`linear`, on one device.
        product: of 128 rows, whose rows do not depend on one another.
    """
    padded, sums = _workspace_views(x, weight, workspace)
    for start in range(0, x.shape[0], GEMM_ROWS):
        piece = slice(start, min(start + GEMM_ROWS, x.shape[0]))
        count = piece.stop - start
        padded[:count].copy_(x[piece])
        product(padded, weight, sums)
        result = sums[:count]
        if bias is not None:
            result += bias
        if residual is not None:
            torch.add(result, residual[piece], out=out[piece])  # in float32, rounded once
        else:
            out[piece].copy_(result)


def _workspace_views(
    x: torch.Tensor, weight: torch.Tensor, workspace: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[128, K]`` of ``x``'s dtype and ``[128, N]`` float32, parts of ``workspace``."""
    num_outputs, num_inputs = weight.shape
    sums_size = GEMM_ROWS * num_outputs * torch.float32.itemsize
    size = sums_size + GEMM_ROWS * num_inputs * x.element_size()
    if workspace is None:
        workspace = x.new_empty(size, dtype=torch.uint8)
    elif workspace.dtype != torch.uint8 or workspace.numel() < size:
        raise ValueError(
            f"workspace: expected at least [{size}] uint8, "
            f"got {list(workspace.shape)} {_name(workspace.dtype)}"
        )
    sums = workspace[:sums_size].view(torch.float32).view(GEMM_ROWS, num_outputs)
    return workspace[sums_size:size].view(x.dtype).view(GEMM_ROWS, num_inputs), sums


def gpu_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """The bare product, cuBLAS' on a GPU: sums and results are float32."""
    if x.dtype == torch.float32:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), torch.float32, out=out)


def check_gpu_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Refuse what does not fit, as the extension does on the CPU.

    Raises:
        ValueError: naming the argument.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x, weight: expected [M, K] and [N, K], got {list(x.shape)} and {list(weight.shape)}"
        )
    if not weight.is_contiguous():
        raise ValueError(f"weight: expected contiguous, got strides {list(weight.stride())}")
    size = (x.shape[0], weight.shape[0])
    own, sums = (x.dtype,), (torch.float32,)
    for name, tensor, shape, dtypes in (
        ("weight", weight, tuple(weight.shape), own),
        ("bias", bias, size[1:], sums),
        ("residual", residual, size, own),
        ("out", out, size, own + sums),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected {list(shape)} {' or '.join(map(_name, dtypes))} on {x.device}, "
                f"got {list(tensor.shape)} {_name(tensor.dtype)} on {tensor.device}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
