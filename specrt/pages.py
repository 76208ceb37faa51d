"""Pages of keys and values by layer: those that are kept for good, and those that a window lets go.

Layers that attend to a sliding window see no row before it, and no later row of the sequence ever
will: the pages there are given back. So layers are grouped by their window, and each group has
pages of its own. A sequence's pages of all groups have the same places: column c of a table holds
rows ``c * page_size`` on, and where they were given back it names the scratch page.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from specrt.config import ModelConfig
from specrt.device import Device

SCRATCH_PAGE = 0
"""No sequence's: a write past a sequence's pages lands here, and never in a neighbour's."""

_FIRST_PAGES = 16  # of a pool that grows for the first time
_NO_MEMORY = RuntimeError, MemoryError, OverflowError, OSError  # torch, Python, the system


@dataclass(frozen=True)
class PageGroup:
    """Layers that keep as much of a sequence as one another."""

    layers: tuple[int, ...]
    window: int | None
    """They see the last so many positions; None: all."""
    page_shape: tuple[int, int, int, int, int]
    """``[layers, 2, page_size, Hkv, d]``"""
    dtype: torch.dtype

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.page_shape[2]

    @property
    def page_bytes(self) -> int:
        """Of one page: its layers' keys and values."""
        return math.prod(self.page_shape) * self.dtype.itemsize

    def num_hidden(self, position: int) -> int:
        """Columns of a table that no row at ``position`` or behind it sees."""
        if self.window is None:
            return 0
        return max(0, position + 1 - self.window) // self.page_size

    def num_pages_at_once(self, num_tokens: int, num_rows: int) -> int:
        """The most pages that a sequence holds on its way to ``num_tokens``.

        Args:
            num_tokens: in all.
            num_rows: that it has pages for behind the first row which is still to be run.
        """
        pages = -(-num_tokens // self.page_size)
        if self.window is None:
            return pages
        # Wherever these rows and the window before them begin.
        return min(pages, (self.window + num_rows - 3) // self.page_size + 2)


def page_groups(config: ModelConfig, dtype: torch.dtype, page_size: int) -> tuple[PageGroup, ...]:
    """A model's layers by their windows: those without one first, then by size.

    A window as long as the context hides nothing and is none.
    """
    layers: dict[int, list[int]] = {}
    for index in range(config.num_layers):
        window = config.form.layer(index).window
        is_full = window is None or window >= config.max_positions
        layers.setdefault(0 if window is None or is_full else window, []).append(index)
    shape = 2, page_size, config.num_kv_heads, config.head_dim
    return tuple(
        PageGroup(tuple(some), window or None, (len(some), *shape), dtype)
        for window, some in sorted(layers.items())
    )


class PagePool:
    """The pages of one group: ``kv [layers, 2, P, page_size, Hkv, d]``, the first for scratch.

    Where there are too few, their number at least doubles; captured steps, which hold the old
    addresses, are then stale.

    Args:
        group: whose.
        index: of the group among its model's.
        device: where to.
        max_pages: that sequences may hold together; None: as many as there is memory for.
    """

    def __init__(self, group: PageGroup, index: int, device: Device, max_pages: int | None) -> None:
        self.group = group
        self.max_pages = max_pages
        self._index = index
        self._device = device
        self._is_retired = False
        self.kv = self._pages(0)
        self._returned: list[int] = []  # sorted
        self._num_touched = 1  # pages from here on have never been a sequence's

    @property
    def num_pages(self) -> int:
        """Pages for sequences, free ones included."""
        return self.kv.shape[2] - 1

    @property
    def num_free_pages(self) -> int:
        """Pages no sequence holds."""
        return len(self._returned) + self.kv.shape[2] - self._num_touched

    @property
    def num_held_pages(self) -> int:
        """Pages that sequences hold."""
        return self._num_touched - 1 - len(self._returned)

    def can_take(self, num_pages: int) -> bool:
        """Whether ``max_pages`` lets sequences have so many more (memory is known by trying)."""
        return self.max_pages is None or num_pages <= self.max_pages - self.num_held_pages

    def make_room(self, num_more: int) -> None:
        """See to it that so many pages are free.

        Raises:
            MemoryError: ``max_pages`` or memory has no room for them; says how much was needed.
                All is as it was.
            RuntimeError: the memory was given back.
        """
        if num_more > self.num_free_pages:
            self._grow(self.num_held_pages + num_more)

    def take(self, tables: list[list[int]], num_columns: int) -> None:
        """Bring a sequence's table to so many columns, by free pages, the lowest first."""
        pages = tables[self._index]
        count = num_columns - len(pages)
        num_new = max(0, count - len(self._returned))
        end = self._num_touched + num_new
        taken = [*self._returned[:count], *range(self._num_touched, end)]
        rest = self._returned[count:]
        # As in `give_back`: the only call comes last.
        self._returned, self._num_touched = rest, end
        pages.extend(taken)

    def give_back(self, tables: list[list[int]], num_columns: int, instead: Iterable[int]) -> None:
        """Free the pages of a sequence's first so many columns, for which ``instead`` stands."""
        pages = tables[self._index]
        gone = [page for page in pages[:num_columns] if page != SCRATCH_PAGE]
        free = sorted([*self._returned, *gone])
        left = [*instead, *pages[num_columns:]]
        # Ctrl-C comes behind a call: there is none between these, and no page is lost.
        tables[self._index], self._returned = left, free

    def release(self, tables: list[list[int]], position: int) -> None:
        """Free what no row of a sequence sees from ``position`` on."""
        pages = tables[self._index]
        count = min(self.group.num_hidden(position), len(pages))
        if count > 0 and pages[count - 1] != SCRATCH_PAGE:
            self.give_back(tables, count, [SCRATCH_PAGE] * count)

    def fix(self, num_pages: int) -> None:
        """Have so many pages for sequences, at once and for good, or as many as there are already.

        Raises:
            MemoryError: there is no room for them.
        """
        self.max_pages = max(num_pages, self.num_pages)
        if num_pages > self.num_pages:
            self._grow(num_pages)

    def retire(self) -> None:
        """Give the memory back for good."""
        if not self._is_retired:
            self._returned.clear()
            self._num_touched = 1
            self.kv = self._pages(0)
            self._device.forget()
            self._is_retired = True

    def _grow(self, needed: int) -> None:
        """Make room for ``needed`` pages in all, and for more where there is memory."""
        if self._is_retired:
            raise RuntimeError("KV cache: expected one in use, got one whose memory was given back")
        most = needed if self.max_pages is None else self.max_pages
        if needed > most:
            raise MemoryError(f"{self._no_room(needed)}: max_pages is {most}")
        roomy = max(needed, 2 * self.num_pages, _FIRST_PAGES)
        try:
            grown = self._pages(roomy if self.max_pages is None else min(roomy, most))
        except _NO_MEMORY:
            try:
                grown = self._pages(needed)
            except _NO_MEMORY as error:
                raise MemoryError(self._no_room(needed)) from error
        touched = slice(self._num_touched)  # reading the others would cost memory
        grown[:, :, touched] = self.kv[:, :, touched]
        self._device.forget()  # first: an interrupt must not leave launches over what is gone
        self.kv = grown

    def _pages(self, num_pages: int) -> torch.Tensor:
        """``kv`` with so many pages for sequences, zeros."""
        layers, two, *page = self.group.page_shape
        shape = layers, two, 1 + num_pages, *page
        return _untouched_zeros(shape, self.group.dtype, self._device)

    def _no_room(self, num_pages: int) -> str:
        group = self.group
        size = num_pages * group.page_bytes / 2**20
        layers = "" if group.window is None else f" of layers with a window of {group.window}"
        return (
            f"KV cache: no memory for {num_pages} pages of {group.page_size} tokens{layers}, "
            f"{size:.0f} MiB"
        )


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> torch.Tensor:
    """Zeros that on the CPU cost no memory before they are written.

    ``torch.zeros`` writes them: a cache that has grown would hold all of its pages at once.
    """
    if device.is_gpu:
        return device.zeros(*shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
