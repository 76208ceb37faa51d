"""Row-invariant ``y = x W^T``: weights are streamed once, for all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from specrt import _C
from specrt.ops import registry
from specrt.ops.registry import register

register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) out,"
    " Tensor(b!)? workspace, bool is_gated, int tile_rows, int num_stages) -> ()",
    _C.linear,
)


@dataclass(frozen=True)
class LinearPlan:
    """How a launch of :func:`linear` is laid out on a GPU; the CPU needs no plan.

    Every plan gives the same bits, so it is chosen for speed alone. With both fields 0 it is the
    one that was measured (``csrc/linear/variants.h``), where none was, by rule.
    """

    tile_rows: int = 0
    """Rows of weights that a block of threads takes: 64 or 128. 0: 64 where 128 would give a GPU
    too few blocks."""
    num_stages: int = 0
    """Of 64 columns of weights, on their way to shared memory: 2 to 8, or as many as there is room
    for. 0: as many as two blocks on an SM have room for; one, where there are no more blocks than
    SMs, or above 64 rows."""


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
    *,
    is_gated: bool = False,
    plan: LinearPlan | None = None,
) -> torch.Tensor:
    """``x @ weight.T (+ bias) (+ residual)`` with float32 accumulation in a fixed order.

    A row of the result depends on that row of ``x`` alone, to the bit: not on the number of rows,
    the other rows, the threads, the instruction set or the plan. On a GPU the order of sums is that
    of ``csrc/linear/slices.h``, a function of the weights' shape.

    Args:
        x: ``[M, K]`` float32; on a GPU bfloat16 or float16. Rows may be strided; on a GPU they lie
            at multiples of 16 bytes.
        weight: ``[N, K]`` contiguous; float32, bfloat16 or float16, on a GPU of ``x``'s dtype, K a
            multiple of 8. With ``is_gated`` N is a multiple of 16, and rows come by turns: 8 of
            gate, 8 of up.
        bias: ``[N]`` float32.
        residual: ``[M, N]`` of ``x``'s dtype, added last; may be ``out``. None with ``is_gated``.
        out: ``[M, N]``, with ``is_gated`` ``[M, N / 2]``, of ``x``'s dtype, on a GPU also float32;
            made if not given. Each step before is in float32, and it is rounded once.
        workspace: on a GPU, float32, at least :func:`linear_workspace`, zeroed when it was made;
            launches of any matrices may share it, one after another. Made if not given.
        is_gated: on a GPU, ``silu(gate) * up`` instead of both.
        plan: on a GPU, another layout of the launch than the one chosen for the shape.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, there is no such plan, or
            ``is_gated`` on the CPU; the argument is named.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0] // 2 if is_gated else weight.shape[0])
    if registry.is_on_gpu(x):
        if workspace is not None and workspace.dtype == torch.uint8:
            check_gpu_linear(x, weight, bias, residual, out)
            linear_in_pieces(x, weight, bias, residual, out, workspace, gpu_product)
            return out
        if workspace is None:
            floats = linear_workspace(weight.shape[0], weight.shape[1], x.shape[0])
            workspace = torch.zeros(floats, device=x.device)
    else:
        workspace = None
    choice = (plan.tile_rows, plan.num_stages) if plan else (0, 0)
    kernel = torch.ops.specrt.linear if torch.compiler.is_compiling() else _C.linear
    kernel(x, weight, bias, residual, out, workspace, is_gated, *choice)
    return out


def linear_workspace(num_outputs: int, num_inputs: int, num_rows: int | None = None) -> int:
    """Floats of ``workspace`` that :func:`linear` needs on a GPU; often none.

    Args:
        num_outputs: N.
        num_inputs: K. A smaller matrix may need more: it is cut into more slices.
        num_rows: the most M; above 256 it makes no difference.

    Raises:
        ValueError: there is no such matrix.
    """
    if num_rows is None:
        return GEMM_ROWS * (num_outputs + num_inputs) * torch.float32.itemsize
    return int(_C.linear_workspace(num_outputs, num_inputs, num_rows))


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
