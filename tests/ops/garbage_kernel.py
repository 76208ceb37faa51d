"""One kernel as garbage is put to it: valid arguments, the call, and what may be spoiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.ops.conftest import Backend

Tensor = torch.Tensor
Arguments = dict[str, Any]
BATCH, NODES, VOCAB, TOP_K = 3, 6, 70, 3
NUM_VARIANTS = 6


@dataclass(frozen=True)
class Kernel:
    """One kernel, and how to call it."""

    make: Callable[[int, Backend], Arguments]
    """Valid arguments: of a variant in ``NUM_VARIANTS``, on the host, in a backend's types."""
    call: Callable[[Arguments], object]
    own: tuple[str, ...]
    """What is read of one sequence, the first dimension's: contents may be spoiled."""
    shared: tuple[str, ...] = ()
    """What is read for all sequences: contents may be spoiled."""
    results: tuple[str, ...] = ()
    """What is written of one sequence, the first dimension's."""
    pages: Mapping[str, int] = field(default_factory=dict)
    """What is written to pages: the dimension that counts them."""
    has_cuda_source: bool = False


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def generator(variant: int) -> torch.Generator:
    return torch.Generator().manual_seed(variant)


def dtype_of(backend: Backend, variant: int) -> torch.dtype:
    """The tensor cores take 16 bits."""
    if backend.runs_cuda_source:
        return (torch.bfloat16, torch.float16)[variant % 2]
    return (torch.float32, torch.bfloat16, torch.float16)[variant % 3]
