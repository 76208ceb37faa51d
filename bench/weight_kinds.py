"""Ways to keep a matrix on the CPU, and a matrix kept so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from specrt.device import Device
from specrt.models.float8 import float8_matrix
from specrt.ops import Matrix


@dataclass(frozen=True)
class Kind:
    """How we keep a matrix, and the nearest that torch multiplies by."""

    dtype: torch.dtype
    """Of torch's matrix."""
    of: Callable[[torch.Tensor], Matrix]
    """Ours, from torch's."""


def _as_it_is(matrix: torch.Tensor) -> Matrix:
    return matrix


def _float8(matrix: torch.Tensor) -> Matrix:
    return float8_matrix(matrix, Device())


KINDS = {
    "float32": Kind(torch.float32, _as_it_is),
    "bfloat16": Kind(torch.bfloat16, _as_it_is),
    "float8": Kind(torch.bfloat16, _float8),
}
SMALL_KINDS = tuple(KINDS)
"""Of which small shapes are measured by default."""
