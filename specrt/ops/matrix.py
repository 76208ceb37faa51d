"""Matrices of weights, as kernels stream them.

N outputs, K inputs. A GPU takes rows; the CPU takes rows too, and what is packed for it: sixteen
outputs side by side, in the order in which they are read (``csrc/core/matrix.h``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from specrt import _C

STRIP_OUTPUTS = 16
"""Outputs that lie side by side in a packed matrix."""


class MatrixKind(IntEnum):
    """How a packed matrix keeps its weights, and what a product by it does with rows of x."""

    BF16_SPLIT = 1
    """bfloat16. Rows are split in two parts of bfloat16 (16 bits of mantissa)."""
    BF16_ROUNDED = 2
    """bfloat16. Rows are rounded to bfloat16."""


@dataclass(frozen=True, eq=False)
class Float8Matrix:
    """A matrix ``[N, K]`` of one byte a weight (e4m3) and a factor a row."""

    values: torch.Tensor
    """``[N, K]`` float8_e4m3fn, contiguous; codes of NaN count as 480. On a GPU K is a multiple of
    16, and of each sixteen columns the two eights lie by turns: 0, 8, 1, 9, .. 7, 15."""
    scale: torch.Tensor
    """``[N]`` float32"""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> torch.Size:
        """N and K."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Of both tensors."""
        return self.values.nbytes + self.scale.nbytes


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix ``[N, K]`` for the CPU."""

    values: torch.Tensor
    """``[ceil(N / 16), bytes]`` uint8, contiguous, at a multiple of 64 bytes."""
    kind: MatrixKind
    num_outputs: int
    """N"""
    num_inputs: int
    """K"""

    @classmethod
    def empty(cls, kind: MatrixKind, num_outputs: int, num_inputs: int) -> PackedMatrix:
        """Memory for such a matrix, all zeros."""
        size = packed_shape(kind, num_outputs, num_inputs)
        memory = torch.zeros(size[0] * size[1] + 64, dtype=torch.uint8)
        start = -memory.data_ptr() % 64
        values = memory[start : start + size[0] * size[1]].view(size)
        return cls(values, kind, num_outputs, num_inputs)

    def __len__(self) -> int:
        return self.num_outputs

    @property
    def shape(self) -> torch.Size:
        """N and K."""
        return torch.Size((self.num_outputs, self.num_inputs))

    @property
    def nbytes(self) -> int:
        """Of the values, padding included."""
        return self.values.nbytes


Matrix = torch.Tensor | Float8Matrix | PackedMatrix
"""What :func:`specrt.ops.linear` multiplies by."""


def packed_shape(kind: MatrixKind, num_outputs: int, num_inputs: int) -> tuple[int, int]:
    """Strips, and bytes of each, of a packed matrix."""
    return -(-num_outputs // STRIP_OUTPUTS), int(_C.matrix_strip_bytes(kind, num_inputs))


def values_of(matrix: Matrix | None) -> torch.Tensor | None:
    """The tensor that holds the weights."""
    return matrix.values if isinstance(matrix, Float8Matrix | PackedMatrix) else matrix


def scale_of(matrix: Matrix | None) -> torch.Tensor | None:
    """A factor a row, where there is one."""
    return matrix.scale if isinstance(matrix, Float8Matrix) else None


def layout_of(matrix: Matrix | None) -> list[int]:
    """What the extension is told of a packed matrix; of others nothing."""
    if not isinstance(matrix, PackedMatrix):
        return []
    return [int(matrix.kind), matrix.num_outputs, matrix.num_inputs]
