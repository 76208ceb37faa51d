"""Row-invariant ``y = x W^T``: weights are streamed once, for all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from specrt import _C
from specrt.ops import registry
from specrt.ops.matrix import (
    Matrix,
    PackedMatrix,
    StackedMatrix,
    layout_of,
    scale_of,
    values_of,
)
from specrt.ops.registry import register

register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) out,"
    " Tensor(b!)? workspace, bool is_gated, int tile_rows, int num_stages,"
    " Tensor(c!)? maxima, Tensor? sampling, Tensor? history_len, Tensor? depth,"
    " Tensor(d!)? masses, Tensor? token_map, int level, Tensor? is_open, Tensor? scale,"
    " Tensor? x_rows, Tensor? second, Tensor? second_rows, Tensor? residual_rows, Tensor? gate,"
    " Tensor? gate_rows, int[] layout) -> ()",
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
    too few blocks. Always 128 with ``maxima`` or float8 weights."""
    num_stages: int = 0
    """Of 64 columns of weights, on their way to shared memory: 2 to 8, or as many as there is room
    for. 0: as many as two blocks on an SM have room for; one, where there are no more blocks than
    SMs, or above 64 rows."""


TILE_TOKENS = 64


@dataclass(frozen=True, eq=False)
class TileMaxima:
    """The best score of every 64 tokens of logits ``[B * N, V]``, which :func:`linear` leaves on a
    GPU for ``tree_accept``: the logit, or, where a sequence samples without filters,
    logit / temperature + Gumbel(seed, history_len + depth)."""

    keys: torch.Tensor
    """``[B * N, ceil(V / 64)]`` int64, written: ``key_of`` of ``csrc/core/score_key.h``, all bits
    ones where a token is NaN or +inf."""
    sampling: torch.Tensor
    """``[B, 8]`` int64, ``SamplingTable.rows``."""
    history_len: torch.Tensor
    """``[B]`` int32."""
    depth: torch.Tensor
    """``[B, N]`` int32, of the trees' nodes."""


@dataclass(frozen=True, eq=False)
class DraftMaxima:
    """What :func:`linear` leaves on a GPU of every 64 of a draft head's logits ``[B * F, R]``, so
    that ``tree_expand``, given the same, reads few of these: the best score, which is the logit,
    where a sequence samples logit / temperature, and where it does so without filters that +
    Gumbel(seed, position + level); and where it does not sample the mass."""

    keys: torch.Tensor
    """``[B * F, ceil(R / 64)]`` int64, written, as those of :class:`TileMaxima`."""
    masses: torch.Tensor
    """``[B * F, ceil(R / 64)]`` float32, written; ``csrc/core/tile_maxima.h``."""
    sampling: torch.Tensor | None = None
    """``[B, 8]`` int64; None if nobody samples. These and the rest are ``tree_expand``'s."""
    position: torch.Tensor | None = None
    """``[B]`` int32; None if ``sampling`` is."""
    level: int = 0
    token_map: torch.Tensor | None = None
    """``[R]`` int32, or None."""


def _parts_of(maxima: TileMaxima | DraftMaxima | None) -> tuple[torch.Tensor | int | None, ...]:
    if maxima is None:
        return (None,) * 6 + (0,)
    if isinstance(maxima, TileMaxima):
        told = maxima.sampling, maxima.history_len, maxima.depth
        return (maxima.keys, *told, None, None, 0)
    drafts = maxima.sampling, maxima.position, None
    return (maxima.keys, *drafts, maxima.masses, maxima.token_map, maxima.level)


class GatheredRows(NamedTuple):
    """On a GPU: rows that :func:`linear` takes out of a table as it needs them."""

    table: torch.Tensor
    """``[S, width]``, S at least 1."""
    rows: torch.Tensor
    """``[M]`` int32: row m is ``table[rows[m]]``, clamped into it."""


Rows = torch.Tensor | GatheredRows


def linear(
    x: Rows,
    weight: Matrix,
    bias: torch.Tensor | None = None,
    residual: Rows | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    *,
    second: Rows | None = None,
    gate: Rows | None = None,
    is_gated: bool = False,
    plan: LinearPlan | None = None,
    maxima: TileMaxima | DraftMaxima | None = None,
    is_open: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T (+ bias) (+ residual)`` with float32 accumulation in a fixed order.

    A row of the result depends on that row of ``x`` alone, to the bit: not on the number of rows,
    the other rows, the threads, the instruction set or the plan. On a GPU the order of sums is that
    of ``csrc/linear/slices.h``, a function of the weights' shape; weights and bias are constants
    there, read before launches before this one have ended (``csrc/core/launch.cuh``).

    Args:
        x: ``[M, K]`` float32; on a GPU bfloat16 or float16. Rows may be strided; on a GPU they lie
            at multiples of 16 bytes, and may be gathered.
        weight: ``[N, K]`` contiguous; float32, bfloat16 or float16, on a GPU of ``x``'s dtype, K a
            multiple of 8. With ``is_gated`` N is a multiple of 16, and rows come by turns: 8 of
            gate, 8 of up. Of a :class:`Float8Matrix` values are multiplied as if they were
            ``x``'s, and the sum by ``scale`` in float32, before the bias. By a
            :class:`PackedMatrix`, on the CPU, as its kind says; a :class:`StackedMatrix` is one
            launch a part there.
        bias: ``[N]`` float32.
        residual: ``[M, N]`` of ``x``'s dtype, added last; may be ``out``. None with ``is_gated``.
            On a GPU it may be gathered, as ``second`` and ``gate`` may.
        out: ``[M, N]``, with ``is_gated`` ``[M, N / 2]``, of ``x``'s dtype, on a GPU also float32;
            made if not given. Each step before is in float32, and it is rounded once.
        workspace: on a GPU, float32, at least :func:`linear_workspace`, zeroed when it was made;
            launches of any matrices may share it, one after another. On the CPU, with packed
            weights, :func:`row_scratch`, likewise. Made if not given.
        second: on a GPU, what stands behind ``x`` in each row: ``[M, K']``, and ``x`` is
            ``[M, K - K']``, both of multiples of 8 values.
        gate: on a GPU, ``[M, N]`` of ``x``'s dtype. The product, with bias and before the residual,
            is multiplied by its silu; may be ``out``. None with ``is_gated`` or ``maxima``.
        is_gated: on a GPU, ``silu(gate) * up`` instead of both.
        plan: on a GPU, another layout of the launch than the one chosen for the shape.
        maxima: on a GPU, of float32 results that are logits: their keys are written besides.
            Results are the same bits; so are keys, whatever the plan and the rows.
        is_open: ``[B]`` int32 flags of sequences, whatever the rows. If all of them are 0, nothing
            is read or written.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, there is no such plan, or what
            only a GPU has is asked of the CPU; the argument is named.
    """
    table, x_rows = _split(x)
    added, residual_rows = _split(residual)
    rest = x_rows, *_split(second), residual_rows, *_split(gate)
    num_rows = table.shape[0] if x_rows is None else x_rows.shape[0]
    if out is None:
        out = table.new_empty(num_rows, weight.shape[0] // 2 if is_gated else weight.shape[0])
    if registry.is_on_gpu(table):
        if workspace is None:
            floats = linear_workspace(weight.shape[0], weight.shape[1], num_rows)
            workspace = torch.zeros(floats, device=table.device)
    elif workspace is None and isinstance(weight, PackedMatrix | StackedMatrix):
        workspace = row_scratch(weight.shape[1], num_rows)
    if isinstance(weight, StackedMatrix):
        _launch_parts(table, weight, bias, added, out, workspace, is_open)
        return out
    choice = (plan.tile_rows, plan.num_stages) if plan else (0, 0)
    kernel = torch.ops.specrt.linear if torch.compiler.is_compiling() else _C.linear
    values = values_of(weight)
    given = table, values, bias, added, out, workspace, is_gated, *choice, *_parts_of(maxima)
    kernel(*given, is_open, scale_of(weight), *rest, layout_of(weight))
    return out


def _launch_parts(
    x: torch.Tensor,
    weight: StackedMatrix,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    is_open: torch.Tensor | None,
) -> None:
    begin = 0
    for part in weight.parts:
        columns = slice(begin, begin + len(part))
        own_bias = None if bias is None else bias[columns]
        own_residual = None if residual is None else residual[:, columns]
        linear(x, part, own_bias, own_residual, out[:, columns], workspace, is_open=is_open)
        begin = columns.stop


def _split(rows: Rows | None) -> tuple[Any, torch.Tensor | None]:
    """The tensor, and which of its rows."""
    return rows if isinstance(rows, GatheredRows) else (rows, None)


def row_scratch(num_inputs: int, num_rows: int) -> torch.Tensor:
    """A ``workspace`` on the CPU, for packed matrices of up to ``num_inputs`` columns.

    Args:
        num_inputs: K.
        num_rows: M.
    """
    floats = torch.empty(int(_C.matmul_workspace(num_inputs, num_rows)) + 16)
    return floats[-floats.data_ptr() % 64 // 4 :]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def linear_workspace(num_outputs: int, num_inputs: int, num_rows: int) -> int:
    """Floats of ``workspace`` that :func:`linear` needs on a GPU; often none.

    Args:
        num_outputs: N.
        num_inputs: K. A smaller matrix may need more: it is cut into more slices.
        num_rows: the most M; above 256 it makes no difference.

    Raises:
        ValueError: there is no such matrix.
    """
    return int(_C.linear_workspace(num_outputs, num_inputs, num_rows))
