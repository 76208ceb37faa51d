"""Matrices as plain rows of values, whatever they are kept as."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from specrt import ops
from specrt.ops import Float8Matrix, Matrix, PackedMatrix, StackedMatrix

_ROWS = 4096  # unpacked at a time


def dense(matrix: Matrix) -> torch.Tensor:
    """``[N, K]``: a tensor as it is, of anything else the float32 values that are multiplied by."""
    if isinstance(matrix, torch.Tensor):
        return matrix
    rows, begin = torch.empty(*matrix.shape), 0
    for piece in pieces(matrix):
        rows[begin : begin + len(piece)] = piece
        begin += len(piece)
    return rows


def pieces(matrix: Matrix, num_rows: int = _ROWS) -> Iterator[torch.Tensor]:
    """:func:`dense`, so many rows at a time at most."""
    if isinstance(matrix, StackedMatrix):
        for part in matrix.parts:
            yield from pieces(part, num_rows)
        return
    for start in range(0, len(matrix), num_rows):
        rows = torch.arange(start, min(start + num_rows, len(matrix)), dtype=torch.int32)
        yield rows_of(matrix, rows)


def rows_of(matrix: torch.Tensor | Float8Matrix | PackedMatrix, rows: torch.Tensor) -> torch.Tensor:
    """``[R, K]``: some rows, ``rows [R]`` int32, as :func:`dense` has them."""
    if isinstance(matrix, PackedMatrix):
        return ops.embed(rows, matrix)
    if isinstance(matrix, Float8Matrix):
        scale = matrix.scale.index_select(0, rows)
        return matrix.values.index_select(0, rows).float() * scale[:, None]
    return matrix.index_select(0, rows)
