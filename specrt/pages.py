"""Pages of keys and values by layer: those that are kept for good, and those that a window lets go.

Layers that attend to a sliding window see no row before it, and no later row of the sequence ever
will: the pages there are given back. So layers are grouped by their window, and each group has
pages of its own. A sequence's pages of all groups have the same places: column c of a table holds
rows ``c * page_size`` on, and where they were given back it names the scratch page.

A page is one sequence's, or it is *shared*: kept for whoever begins with the same tokens
(:mod:`specrt.prefixes`), and held by any number of sequences, none of which writes to it. One that
is kept and that no sequence holds may be had as soon as pages are needed.
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
        self._users: dict[int, int] = {}  # of shared pages, the sequences that hold each
        self.num_kept_pages = 0
        """Shared pages that no sequence holds."""

    @property
    def num_pages(self) -> int:
        """Pages for sequences, free ones included."""
        return self.kv.shape[2] - 1

    @property
    def num_free_pages(self) -> int:
        """Pages no sequence holds, those that are kept among them."""
        return self._num_unused + self.num_kept_pages

    @property
    def num_held_pages(self) -> int:
        """Pages that sequences hold."""
        return self._num_touched - 1 - len(self._returned) - self.num_kept_pages

    @property
    def num_shared_pages(self) -> int:
        """Pages that are kept for later sequences, held by some now or not."""
        return len(self._users)

    @property
    def _num_unused(self) -> int:
        return len(self._returned) + self.kv.shape[2] - self._num_touched

    def can_take(self, num_pages: int) -> bool:
        """Whether ``max_pages`` lets sequences have so many more (memory is known by trying)."""
        return self.max_pages is None or num_pages <= self.max_pages - self.num_held_pages

    def num_in_the_way(self, num_more: int) -> int:
        """Kept pages that must go before ``max_pages`` lets sequences have so many more."""
        if self.max_pages is None or not self.can_take(num_more):
            return 0
        return max(0, self.num_held_pages + self.num_kept_pages + num_more - self.max_pages)

    def make_room(self, num_more: int) -> None:
        """See to it that so many pages are nobody's.

        Raises:
            MemoryError: ``max_pages`` or memory has no room for them; says how much was needed.
                All is as it was.
            RuntimeError: the memory was given back.
        """
        if num_more > self._num_unused:
            self._check_limit(self.num_held_pages + num_more)
            self._grow(self.num_held_pages + self.num_kept_pages + num_more)

    def take(self, tables: list[list[int]], num_columns: int) -> None:
        """Bring a sequence's table to so many columns, by free pages, the lowest first."""
        pages = tables[self._index]
        taken, rest, end = self._next(num_columns - len(pages))
        # As in `give_back`: the only call comes last.
        self._returned, self._num_touched = rest, end
        pages.extend(taken)

    def give_back(self, tables: list[list[int]], num_columns: int, instead: Iterable[int]) -> None:
        """Let go of the pages of a sequence's first so many columns, for which ``instead`` stands.

        Those that are shared are then kept, the others free.
        """
        pages, users, num_kept = tables[self._index], self._users, self.num_kept_pages
        gone = [page for page in pages[:num_columns] if page != SCRATCH_PAGE]
        shared = [page for page in gone if page in users]
        if shared:
            users = {**users, **{page: users[page] - 1 for page in shared}}
            num_kept += [users[page] for page in shared].count(0)
        free = sorted([*self._returned, *(page for page in gone if page not in users)])
        left = [*instead, *pages[num_columns:]]
        # Ctrl-C comes behind a call: there is none between these, and no page is lost.
        tables[self._index], self._returned = left, free
        self._users, self.num_kept_pages = users, num_kept

    # --- shared pages -------------------------------------------------------------------------

    def is_shared(self, page: int) -> bool:
        """Whether it is kept for later sequences."""
        return page in self._users

    def is_held(self, page: int) -> bool:
        """Whether a sequence holds a shared page."""
        return self._users.get(page, 0) > 0

    def keep(self, kept: list[int], page: int) -> None:
        """A page of one sequence is shared from now on, and stands in ``kept``."""
        kept[self._index], self._users[page] = page, 1

    def forget(self, kept: list[int]) -> None:
        """The page in ``kept``, which no sequence holds, is free."""
        page, num_kept = kept[self._index], self.num_kept_pages - 1
        free = sorted([*self._returned, page])
        # (No calls.)
        kept[self._index], self._returned, self.num_kept_pages = SCRATCH_PAGE, free, num_kept
        del self._users[page]

    def hold(self, tables: list[list[int]], pages: list[int]) -> None:
        """A sequence without pages holds these, which are shared, or the scratch page."""
        shared = [page for page in pages if page != SCRATCH_PAGE]
        users = {**self._users, **{page: self._users[page] + 1 for page in shared}}
        num_kept = self.num_kept_pages - [users[page] for page in shared].count(1)
        tables[self._index], self._users, self.num_kept_pages = pages, users, num_kept

    def swap(self, tables: list[list[int]], column: int, page: int) -> None:
        """A sequence holds a shared page in place of its own, which is free."""
        pages, num_kept = list(tables[self._index]), self.num_kept_pages
        free = sorted([*self._returned, pages[column]])
        pages[column] = page
        count = self._users[page] + 1
        if count == 1:
            num_kept -= 1
        tables[self._index], self._returned, self.num_kept_pages = pages, free, num_kept
        self._users[page] = count

    def copy_last(self, tables: list[list[int]]) -> None:
        """A sequence gets a page of its own with what stands in its last one, which is shared.

        There is a page that is nobody's (:meth:`make_room`).
        """
        *before, shared = tables[self._index]
        (page,), rest, end = self._next(1)
        # A launch, as all that writes pages: in its turn behind those that wrote what is copied.
        self.kv[:, :, page].copy_(self.kv[:, :, shared])
        pages, count, num_kept = [*before, page], self._users[shared] - 1, self.num_kept_pages
        if count == 0:
            num_kept += 1
        tables[self._index], self._returned, self._num_touched = pages, rest, end
        self._users[shared], self.num_kept_pages = count, num_kept

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
            self._users.clear()
            self._num_touched, self.num_kept_pages = 1, 0
            self.kv = self._pages(0)
            self._device.forget()
            self._is_retired = True

    def _next(self, count: int) -> tuple[list[int], list[int], int]:
        """So many pages that are nobody's; what is left of those given back; those touched then."""
        count = max(0, count)
        end = self._num_touched + max(0, count - len(self._returned))
        taken = [*self._returned[:count], *range(self._num_touched, end)]
        return taken, self._returned[count:], end

    def _check_limit(self, num_pages: int) -> None:
        if self._is_retired:
            raise RuntimeError("KV cache: expected one in use, got one whose memory was given back")
        if self.max_pages is not None and num_pages > self.max_pages:
            raise MemoryError(f"{self._no_room(num_pages)}: max_pages is {self.max_pages}")

    def _grow(self, needed: int) -> None:
        """Make room for ``needed`` pages in all, and for more where there is memory."""
        self._check_limit(needed)
        roomy = max(needed, 2 * self.num_pages, _FIRST_PAGES)
        try:
            grown = self._pages(min(roomy, self.max_pages or roomy))
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
