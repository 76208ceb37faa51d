"""Values of a mapped file into the memory of matrices, piece by piece.

Pages of what was read are given up as soon as it is there, so that loading needs hardly more memory
than what is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from specrt import ops
from specrt.models.checkpoint import Checkpoint, TensorInfo
from specrt.models.layouts import dtype_name
from specrt.models.packing import Form
from specrt.ops import MatrixKind, PackedMatrix
from specrt.ops.matrix import packed_shape
from specrt.types import CheckpointError

# Elements converted at a time: few enough that torch does not split them over threads (waking those
# costs more than it wins on a busy machine) and that they are still cached for the check.
_CHUNK = (1 << 15) - 1
# Bytes of a file that are in hand, about, and after which pages are given up.
_PIECE, _MOST_READ = 4 << 20, 12 << 20


@dataclass(frozen=True)
class Part:
    """Rows of a matrix that are kept in one form."""

    keys: tuple[str, ...]
    """The tensors whose rows they are, one behind the other."""
    shape: tuple[int, int]
    form: Form

    @property
    def num_bytes(self) -> int:
        """Of memory."""
        if isinstance(self.form, MatrixKind):
            return math.prod(packed_shape(self.form, *self.shape))
        return math.prod(self.shape) * self.form.itemsize

    def within(self, memory: torch.Tensor) -> torch.Tensor | PackedMatrix:
        """The matrix in ``memory [num_bytes]``, which is all zeros."""
        if isinstance(self.form, MatrixKind):
            return PackedMatrix.within(memory, self.form, *self.shape)
        return memory.view(self.form).view(self.shape)


def parts_of(
    keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]], forms: Mapping[str, Form]
) -> list[Part]:
    """A matrix of the rows of ``keys``: neighbours of one form are one part."""
    parts = []
    for form, group in groupby(keys, lambda key: forms[key]):
        some = tuple(group)
        num_rows = sum(shapes[key][0] for key in some)
        parts.append(Part(some, (num_rows, shapes[some[0]][1]), form))
    return parts


class Pieces:
    """Reads a checkpoint's tensors, some rows at a time.

    Args:
        checkpoint: of which nobody else holds a tensor.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._num_bytes = 0

    def of(self, key: str, unit: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row of each piece, and the rows as stored: use them before the next piece.

        Args:
            key: the tensor's.
            unit: rows that are not to be parted.
        """
        num_rows = self._checkpoint.infos[key].shape[0]
        row_bytes = self._checkpoint.rows(key, 0, 1).nbytes
        step = max(unit, _PIECE // row_bytes // unit * unit)
        reads_all = self._checkpoint.reads_all(key)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            yield start, self._checkpoint.rows(key, start, stop)
            self._count((num_rows if reads_all else stop - start) * row_bytes)

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes >= _MOST_READ:
            self._checkpoint.release()
            self._num_bytes = 0


def write_rows(
    source: torch.Tensor,
    destination: torch.Tensor | PackedMatrix,
    first_row: int,
    info: TensorInfo,
) -> None:
    """Put rows into a matrix or vector, in its own form.

    Args:
        source: ``[R, ...]`` of a float type; of a tensor in blocks their bytes.
        destination: whose rows from ``first_row`` on are written.
        first_row: of them.
        info: of the tensor, for messages.

    Raises:
        CheckpointError: values that are not finite, or not in the destination's dtype.
    """
    kept = destination.kind if isinstance(destination, PackedMatrix) else None
    if isinstance(info.dtype, MatrixKind) and info.dtype != kept:
        source = block_values(source, info.dtype, info)
    if isinstance(destination, PackedMatrix):
        if source.dtype == torch.float64:
            source = source.float()
        if not ops.matrix_pack(source, destination, first_row):
            kind = destination.kind
            is_wide = kind in (MatrixKind.BF16_SPLIT, MatrixKind.BF16_ROUNDED)
            raise _not_finite(source, torch.bfloat16 if is_wide else torch.float32, info)
        return
    _convert(source, destination[first_row : first_row + len(source)], info)


def block_values(source: torch.Tensor, kind: MatrixKind, info: TensorInfo) -> torch.Tensor:
    """``[R, K]`` float32 of a tensor's bytes in blocks.

    Raises:
        CheckpointError: NaN or infinite scales.
    """
    packed = PackedMatrix.empty(kind, len(source), info.shape[1])
    write_rows(source, packed, 0, info)
    return ops.embed(torch.arange(len(source), dtype=torch.int32), packed)


def _convert(source: torch.Tensor, destination: torch.Tensor, info: TensorInfo) -> None:
    """Copy ``source`` into ``destination``, refusing NaN and infinity."""
    num_rows = max(1, _CHUNK // max(1, math.prod(source.shape[1:])))
    for start in range(0, source.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        destination[rows].copy_(source[rows])
        low, high = torch.aminmax(destination[rows])
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise _not_finite(source[rows], destination.dtype, info)


def _not_finite(chunk: torch.Tensor, dtype: torch.dtype, info: TensorInfo) -> CheckpointError:
    if isinstance(info.dtype, MatrixKind):
        return CheckpointError(f"{info.file}: {info.key}: has blocks with NaN or infinite scales")
    if not bool(torch.isfinite(chunk).all()):
        return CheckpointError(f"{info.file}: {info.key}: has NaN or infinite values")
    largest = chunk.abs().max().item()
    return CheckpointError(
        f"{info.file}: {info.key}: {largest:g} is out of {dtype_name(dtype)}'s range; "
        "load as another dtype"
    )
