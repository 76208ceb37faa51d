"""The memory of a model's matrices, one behind the other as a step reads them."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from contextlib import suppress

import torch

ALIGNMENT = 64
"""Bytes; where a matrix of an arena may begin."""
_HUGE_PAGE = 2 << 20


class Arena:
    """Hands out consecutive aligned pieces of one allocation, all zeros.

    Args:
        sizes: bytes of all that will be taken.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self._used = 0
        self.memory = _allocate(sum(map(_aligned, sizes)))

    def take(self, size: int) -> torch.Tensor:
        """The next ``[size]`` bytes."""
        piece = self.memory[self._used : self._used + size]
        self._used += _aligned(size)
        return piece


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _allocate(size: int) -> torch.Tensor:
    """``[size]`` zeros on a 2 MiB boundary, in huge pages where the system gives them."""
    room = size + _HUGE_PAGE
    if hasattr(mmap, "MAP_ANONYMOUS") and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapping = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no memory for {size} bytes of weights") from error
        with suppress(OSError):  # a kernel without huge pages: only slower
            mapping.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
    else:
        memory = torch.zeros(room, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    return memory[start : start + size]
