"""``linear`` in a GPU's interface by the CPU's product: for tests of what calls it.

Rows of 16 bits, any number of them, each by itself; gated products; float32 results. It costs what
a product costs on the CPU, where the kernel's source under the shim takes a thousand times that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from specrt import _C, ops
from specrt.models.float8 import in_order
from specrt.models.gate_up import ROWS_IN_TURN
from tests.oracles.tile_maxima import draft_maxima, tile_maxima

Tensor = torch.Tensor
Rows = Tensor | ops.GatheredRows
_NO_MAXIMA = (None,) * 6 + (0,)
_NOT_GATHERED = (*(None,) * 6, [])


def taken(rows: Rows) -> Tensor:
    """As an index says, which is clamped into the table."""
    if not isinstance(rows, ops.GatheredRows):
        return rows
    return rows.table[rows.rows.clamp(0, len(rows.table) - 1).long()]


def product(
    x: Rows,
    weight: ops.Matrix,
    bias: Tensor | None,
    residual: Rows | None,
    out: Tensor,
    workspace: Tensor | None = None,
    *,
    second: Rows | None = None,
    gate: Rows | None = None,
    is_gated: bool = False,
    maxima: ops.TileMaxima | ops.DraftMaxima | None = None,
    is_open: Tensor | None = None,
) -> None:
    """As ``ops.linear`` on a GPU: float32 within, one rounding at the end."""
    if is_open is not None and not is_open.any():
        return
    x = taken(x) if second is None else torch.cat([taken(x), taken(second)], -1)
    num_rows, num_outputs = len(x), len(weight)
    scale = None
    if isinstance(weight, ops.Float8Matrix):
        weight, scale = in_order(weight.values), weight.scale
    assert scale is not None or x.dtype == weight.dtype, "as a GPU's kernel has it"
    assert x.dtype.itemsize == 2
    if workspace is not None:
        size = ops.linear_workspace(*weight.shape, num_rows)
        assert workspace.dtype == torch.float32 and workspace.numel() >= size, workspace.shape
    added = None if residual is None else taken(residual).float()
    sums, rest = torch.empty(num_rows, num_outputs), (*_NO_MAXIMA, None, scale, *_NOT_GATHERED)
    last = None if gate is not None else added
    _C.linear(x.float(), weight, bias, last, sums, None, False, 0, 0, *rest)
    if gate is not None:
        _C.activate(torch.cat([taken(gate).float(), sums], -1), sums, "silu", True)
        sums = sums if added is None else sums + added
    if is_gated:
        in_turn = sums.view(num_rows, -1, 2, ROWS_IN_TURN).transpose(1, 2)
        sums = torch.empty(num_rows, num_outputs // 2)
        _C.activate(in_turn.reshape(num_rows, num_outputs), sums, "silu", True)
    out.copy_(sums)
    if isinstance(maxima, ops.DraftMaxima):
        keys, masses = draft_maxima(sums, maxima)
        maxima.keys.copy_(keys)
        maxima.masses.copy_(masses)
    elif maxima is not None:
        keys = tile_maxima(sums, maxima.sampling, maxima.history_len, maxima.depth)
        maxima.keys.copy_(keys)


def stand_in(
    monkeypatch: pytest.MonkeyPatch,
    is_for_gpu: Callable[[Tensor], bool],
    run: Callable[[Callable[[], None]], None] = lambda call: call(),
) -> None:
    """Let :func:`product` stand for ``linear`` wherever ops and models call it.

    Args:
        monkeypatch: until it is undone.
        is_for_gpu: whether a GPU's kernel would take such rows; others go the usual way.
        run: runs a product; where launches are captured, later.
    """
    usual = ops.linear

    def linear(
        x: Rows,
        weight: ops.Matrix,
        bias: Tensor | None = None,
        residual: Rows | None = None,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
        **asked: Any,
    ) -> Tensor:
        table, *index = x if isinstance(x, ops.GatheredRows) else (x,)
        if not is_for_gpu(table):
            assert asked.get("maxima") is None, "the CPU makes none"
            return usual(x, weight, bias, residual, out, workspace, **asked)
        if out is None:
            num_rows = len(index[0] if index else table)
            out = table.new_empty(num_rows, len(weight) // (2 if asked.get("is_gated") else 1))
        run(partial(product, x, weight, bias, residual, out, workspace, **asked))
        return out

    for user in (ops, sys.modules["specrt.ops.feature_sample"]):
        monkeypatch.setattr(user, "linear", linear)
