"""Ways to keep a matrix on the CPU, and a matrix kept so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.random_blocks import BLOCKS, random_rows
from specrt import ops
from specrt.device import Device
from specrt.models.float8 import float8_matrix
from specrt.ops import Matrix, MatrixKind


@dataclass(frozen=True)
class Kind:
    """How we keep a matrix, and the nearest that torch multiplies by."""

    dtype: torch.dtype
    """Of torch's matrix."""
    of: Callable[[torch.Tensor], Matrix]
    """Ours, from torch's; of blocks one of that shape, whose values are others."""


def _as_it_is(matrix: torch.Tensor) -> Matrix:
    return matrix


def _float8(matrix: torch.Tensor) -> Matrix:
    return float8_matrix(matrix, Device())


def _packed(kind: MatrixKind, matrix: torch.Tensor) -> Matrix:
    """Where rows are no whole blocks of the kind they are of Q8_0, as converters leave them."""
    block = BLOCKS.get(kind.name.lower())
    if block is not None and matrix.shape[1] % block.num_weights:
        kind, block = MatrixKind.Q8_0, BLOCKS["q8_0"]
    source = random_rows(kind.name.lower(), *matrix.shape, seed=0) if block else matrix
    return ops.pack_matrix(torch.as_tensor(source), kind, matrix.shape[1])


def _kind(kind: MatrixKind) -> Kind:
    return Kind(torch.bfloat16, partial(_packed, kind))


KINDS = {
    "float32": Kind(torch.float32, _as_it_is),
    "bfloat16": Kind(torch.bfloat16, _as_it_is),
    "float8": Kind(torch.bfloat16, _float8),
    **{kind.name.lower(): _kind(kind) for kind in MatrixKind},
}
SMALL_KINDS = ("float32", "bfloat16", "float8")
"""Of which small shapes are measured by default."""
