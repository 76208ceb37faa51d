"""Rows of weights into a packed matrix, as they are read from a file."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.matrix import MatrixKind, PackedMatrix, layout_of
from specrt.ops.registry import register

register(
    "matrix_pack(Tensor source, Tensor(a!) values, Tensor(b!) is_bad, int[] layout,"
    " int first_row) -> ()",
    _C.matrix_pack,
)


def matrix_pack(source: torch.Tensor, matrix: PackedMatrix, first_row: int = 0) -> bool:
    """Write rows into a packed matrix.

    Args:
        source: ``[R, K]`` float32, bfloat16 or float16, on the CPU; rows may be strided. Rounded to
            nearest, ties to even; to int8 in steps of a row's largest magnitude / 127. Of GGUF's
            kinds ``[R, bytes of a row]`` uint8, as a file has them.
        matrix: whose rows ``first_row .. first_row + R`` are written, and the padding of their K.
        first_row: of them.

    Returns:
        Whether all values, or of a file's blocks all scales, are finite.

    Raises:
        ValueError: a shape or dtype does not fit, or rows are outside; the argument is named.
    """
    is_bad = torch.zeros(1, dtype=torch.int32)
    _C.matrix_pack(source, matrix.values, is_bad, layout_of(matrix), first_row)
    return not is_bad.item()


def pack_matrix(
    source: torch.Tensor, kind: MatrixKind, num_inputs: int | None = None
) -> PackedMatrix:
    """A packed matrix of rows, in memory of its own.

    Args:
        source: ``[N, ...]``, as of :func:`matrix_pack`; what is not finite stays so.
        kind: of the matrix.
        num_inputs: K; None: a row's values.

    Raises:
        ValueError: as of :func:`matrix_pack`.
    """
    matrix = PackedMatrix.empty(kind, len(source), num_inputs or source.shape[1])
    matrix_pack(source, matrix)
    return matrix
