"""Matrices of weights, as kernels stream them.

N outputs, K inputs. A GPU takes rows; the CPU takes rows too, and what is packed for it: sixteen
outputs side by side, in the order in which they are read (``csrc/core/matrix.h``).
"""

from __future__ import annotations

import math
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
    INT8 = 3
    """Signed bytes and a float32 scale an output. Of this and what follows rows are rounded to 16
    bits, and products of a group are exact integers."""
    Q8_0 = 4
    """Of GGUF, as all that follow: 32 signed bytes and a scale; K a multiple of 32."""
    Q4_0 = 5
    """32 values of 4 bits and a scale."""
    Q4_1 = 6
    """32 values of 4 bits, a scale and a minimum."""
    Q4_K = 7
    """256 values of 4 bits, scales and minima of 32 in 6 bits; K a multiple of 256."""
    Q6_K = 8
    """256 values of 6 bits, scales of 16 in 8 bits; K a multiple of 256."""


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
        size = math.prod(packed_shape(kind, num_outputs, num_inputs))
        memory = torch.zeros(size + 64, dtype=torch.uint8)
        start = -memory.data_ptr() % 64
        return cls.within(memory[start : start + size], kind, num_outputs, num_inputs)

    @classmethod
    def within(
        cls, memory: torch.Tensor, kind: MatrixKind, num_outputs: int, num_inputs: int
    ) -> PackedMatrix:
        """In memory that is there: as many bytes as :func:`packed_shape` says, all zeros, at a
        multiple of 64."""
        values = memory.view(packed_shape(kind, num_outputs, num_inputs))
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


@dataclass(frozen=True, eq=False)
class StackedMatrix:
    """Matrices of several kinds, one below the other: what is multiplied at once and kept apart."""

    parts: tuple[torch.Tensor | PackedMatrix, ...]
    """At least two, of the same K."""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def shape(self) -> torch.Size:
        """N, of all, and K."""
        return torch.Size((len(self), self.parts[0].shape[1]))

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for part in self.parts)


Matrix = torch.Tensor | Float8Matrix | PackedMatrix | StackedMatrix
"""What :func:`specrt.ops.linear` multiplies by."""


def packed_shape(kind: MatrixKind, num_outputs: int, num_inputs: int) -> tuple[int, int]:
    """Strips, and bytes of each, of a packed matrix."""
    return -(-num_outputs // STRIP_OUTPUTS), int(_C.matrix_strip_bytes(kind, num_inputs))


def values_of(matrix: Matrix | None) -> torch.Tensor | None:
    """The tensor that holds the weights."""
    assert not isinstance(matrix, StackedMatrix), "its parts are given one by one"
    return matrix.values if isinstance(matrix, Float8Matrix | PackedMatrix) else matrix


def scale_of(matrix: Matrix | None) -> torch.Tensor | None:
    """A factor a row, where there is one."""
    return matrix.scale if isinstance(matrix, Float8Matrix) else None


def layout_of(matrix: Matrix | None) -> list[int]:
    """What the extension is told of a packed matrix; of others nothing."""
    if not isinstance(matrix, PackedMatrix):
        return []
    return [int(matrix.kind), matrix.num_outputs, matrix.num_inputs]
