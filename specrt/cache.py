"""Paged keys and values.

A :class:`KVCache` owns the pages; a :class:`CacheBatch` is the sequences that run together. Forward
passes write rows past ``kv_len``; only :meth:`CacheBatch.commit` makes them part of a sequence, so
that abandoning a round needs no undo.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from specrt import ops
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.reuse import power_of_two

SCRATCH_PAGE = 0
"""No sequence's: a write past a sequence's pages lands here, and never in a neighbour's."""

_UNKNOWN = -1  # of a row's length
_NO_SIZE = -1, -1  # of tables of which there are no views
_NO_PAGES: tuple[list[int], int] = [], 0  # no sequence's
_FIRST_PAGES = 16  # of a cache that grows for the first time
_NO_MEMORY = RuntimeError, MemoryError, OverflowError, OSError  # torch, Python, the system


@dataclass(eq=False)
class CachedSequence:
    """One sequence's pages and how many of its tokens they hold."""

    pages: list[int] = field(default_factory=list)
    """In the order of their rows. The list is only ever extended; closing puts another one here."""
    length: int = 0


class KVCache:
    """The pages of one model: ``kv [L, 2, P, page_size, Hkv, d]``, the first of them for scratch.

    Sequences take pages as they need them, the lowest free one first, so that memory that has been
    touched is used again. Where there are too few, their number at least doubles; captured steps,
    which hold the old addresses, are then stale.

    Args:
        config: the model's.
        dtype: of keys and values.
        page_size: tokens.
        device: where to; None: the CPU.
        max_pages: that sequences may hold together; None: as many as there is memory for.

    Raises:
        ValueError: ``max_pages`` is below 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        page_size: int = 64,
        *,
        device: Device | None = None,
        max_pages: int | None = None,
    ) -> None:
        if max_pages is not None and max_pages < 1:
            raise ValueError(f"max_pages: expected at least 1, got {max_pages}")
        self.page_size = page_size
        self.max_pages = max_pages
        self._shape = (config.num_layers, 2, 1, page_size, config.num_kv_heads, config.head_dim)
        self.device = device or Device()
        self._is_retired = False
        self.kv = _untouched_zeros(self._shape, dtype, self.device)
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

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        layers, two, _, rows, heads, width = self._shape
        return layers * two * rows * heads * width * self.kv.element_size()

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value pages of a layer, each ``[P, page_size, Hkv, d]``."""
        return self.kv[index, 0], self.kv[index, 1]

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` rows of one sequence."""
        return -(-num_tokens // self.page_size)

    def can_reserve(self, num_pages: int) -> bool:
        """Whether ``max_pages`` lets sequences have so many more (memory is known by trying)."""
        return self.max_pages is None or num_pages <= self.max_pages - self.num_held_pages

    def open(self, num_tokens: int = 0) -> CachedSequence:
        """A new sequence, with pages for ``num_tokens`` rows.

        Raises:
            MemoryError: as :meth:`reserve`.
        """
        sequence = CachedSequence()
        self.reserve(sequence, num_tokens)
        return sequence

    def reserve(self, sequence: CachedSequence, num_tokens: int) -> None:
        """Give a sequence the pages it lacks to write ``num_tokens`` rows in all.

        Raises:
            MemoryError: ``max_pages`` or memory has no room for them; says how much was needed.
                Sequence and cache are as they were.
            RuntimeError: the cache's memory was given back.
        """
        num_more = self.num_pages_for(num_tokens) - len(sequence.pages)
        if num_more <= 0:
            return
        if num_more > self.num_free_pages:
            self._grow(self.num_held_pages + num_more)
        self._take(sequence.pages, num_more)

    def close(self, sequence: CachedSequence) -> None:
        """Give a sequence's pages back; closed again it has none to give."""
        free = sorted([*self._returned, *sequence.pages])
        # Ctrl-C comes behind a call: there is none between these, and no page is lost.
        sequence.pages, self._returned = [], free

    def fix(self, num_pages: int) -> None:
        """Have so many pages for sequences, at once and for good, or as many as there are already.

        Raises:
            MemoryError: there is no room for them.
        """
        self.max_pages = max(num_pages, self.num_pages)
        if num_pages > self.num_pages:
            self._grow(num_pages)

    def retire(self) -> None:
        """Give the memory back for good, if no sequence holds a page of it."""
        if self.num_held_pages == 0 and not self._is_retired:
            self._returned.clear()
            self._num_touched = 1
            self.kv = _untouched_zeros(self._shape, self.kv.dtype, self.device)
            self.device.forget()
            self._is_retired = True

    def _take(self, pages: list[int], count: int) -> None:
        """Add so many free pages."""
        num_new = max(0, count - len(self._returned))
        end = self._num_touched + num_new
        taken = [*self._returned[:count], *range(self._num_touched, end)]
        rest = self._returned[count:]
        # As in `close`: the only call comes last.
        self._returned, self._num_touched = rest, end
        pages.extend(taken)

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
        self.device.forget()  # first: an interrupt must not leave launches over what is gone
        self.kv = grown

    def _pages(self, num_pages: int) -> torch.Tensor:
        """``kv`` with so many pages for sequences, zeros."""
        shape = (*self._shape[:2], 1 + num_pages, *self._shape[3:])
        return _untouched_zeros(shape, self.kv.dtype, self.device)

    def _no_room(self, num_pages: int) -> str:
        size = num_pages * self.page_bytes / 2**20
        pages = f"{num_pages} pages of {self.page_size} tokens, {size:.0f} MiB"
        return f"KV cache: no memory for {pages}"


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> torch.Tensor:
    """Zeros that on the CPU cost no memory before they are written.

    ``torch.zeros`` writes them: a cache that has grown would hold all of its pages at once.
    """
    if device.is_gpu:
        return device.zeros(*shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class CacheBatch:
    """The sequences of one forward pass, as the tables the kernels read.

    ``block_table [B, W]`` and ``kv_len [B]``, both int32, lie where the pages do. They are written
    row by row where something has changed, in memory that moves only for more sequences or a larger
    width than ever before. Lengths are also counted on the host, so that nobody waits for a GPU to
    learn them; while a launched commit has not been heard of, the device's are ahead of them.

    Args:
        cache: theirs.
        sequences: B of them; :meth:`update` puts others here.
    """

    def __init__(self, cache: KVCache, sequences: Sequence[CachedSequence] = ()) -> None:
        self.cache = cache
        self.sequences: list[CachedSequence] = []
        self._make_tables(1, _table_width(0))
        self.update(sequences)

    @property
    def num_positions(self) -> int:
        """No row's position reaches this: each is at most the row's place in its pages."""
        return self.block_table.shape[1] * self.cache.page_size

    def update(self, sequences: Sequence[CachedSequence], *, is_ahead: bool = False) -> CacheBatch:
        """Make the tables fit ``sequences``, in this order, as they are now.

        To be called when others run, when one has been given pages, and when one was extended
        through another batch. W is a power of two, 8 at least, that the longest one fits.

        Args:
            sequences: whose tables these are from now on.
            is_ahead: a commit is under way whose counts nobody has told :meth:`advance`; the
                sequences are those of before, and their lengths are left alone.

        Returns:
            This batch.
        """
        rows, widest = self._capacity
        width = _table_width(max((len(one.pages) for one in sequences), default=0))
        if len(sequences) > rows:
            # Powers of two, so that few different sizes (and captured graphs) come up.
            self._make_tables(power_of_two(len(sequences)), max(width, widest))
        elif width > widest:
            self._widen(width)
        for row, sequence in enumerate(sequences):
            pages, count = self._pages[row]
            if pages is not sequence.pages or count != len(pages):
                self._write_pages(row, sequence.pages)
            if self._lengths[row] != sequence.length and not is_ahead:
                self._write_length(row, sequence.length)
        self.sequences = list(sequences)
        if (len(sequences), width) != self._size:
            self._set_views(len(sequences), width)
        return self

    def commit(self, path: torch.Tensor, num_path: torch.Tensor) -> None:
        """Move the accepted rows into place and make them part of their sequences.

        Args:
            path: ``[B, D]`` int32 on the host, node indices from the root down.
            num_path: ``[B]`` int32 on the host, how many of each row count; 0 or less commits
                nothing.
        """
        there = self.cache.device.there
        self.move(there(path), there(num_path))
        # As the kernel does.
        self.advance([min(max(0, count), path.shape[1]) for count in num_path.tolist()])

    def move(self, path: torch.Tensor, num_path: torch.Tensor) -> None:
        """The half of :meth:`commit` that is a launch: on the pages' device, which alone may know
        how many rows there are. :meth:`advance` follows once the host knows it too."""
        self.expect_move()
        self.launch_move(path, num_path)

    def expect_move(self) -> None:
        """What :meth:`move` is to the host: of rows that move nothing is known, and an interrupt
        may come in between."""
        self._lengths[: len(self.sequences)] = [_UNKNOWN] * len(self.sequences)

    def launch_move(self, path: torch.Tensor, num_path: torch.Tensor) -> None:
        """What :meth:`move` is to the device; a captured round has it among its launches."""
        ops.kv_commit(self.cache.kv, self.block_table, path, num_path, self.kv_len, self._tickets)

    def advance(self, counts: Sequence[int], *, is_ahead: bool = False) -> None:
        """The other half: so many rows of each sequence were moved.

        Args:
            counts: of the sequences.
            is_ahead: another commit is under way.
        """
        for row, (sequence, count) in enumerate(zip(self.sequences, counts, strict=True)):
            sequence.length += count
            self._lengths[row] = _UNKNOWN if is_ahead else sequence.length
            room = len(sequence.pages) * self.cache.page_size
            assert sequence.length <= room, "rows were committed that lie on the scratch page"

    def _make_tables(self, rows: int, width: int) -> None:
        """Empty ones, without views."""
        assert SCRATCH_PAGE == 0, "zeros are tables of it"
        table = self.cache.device.zeros(rows, width, dtype=torch.int32)
        kv_len = self.cache.device.zeros(rows, dtype=torch.int32)
        # The CUDA kernel's, zero between launches; made here, so that committing allocates nothing.
        tickets = torch.zeros_like(kv_len)
        # All or none of them (Ctrl-C comes behind calls); the size, that views are made of them.
        self._table, self._kv_len, self._all_tickets = table, kv_len, tickets
        self._capacity = rows, width  # asking a tensor takes longer than all else of an update
        # What stands in the rows: pages (the list itself, and how many of it), and kv_len.
        self._pages, self._lengths, self._size = [_NO_PAGES] * rows, [0] * rows, _NO_SIZE

    def _widen(self, width: int) -> None:
        """More columns; lengths and tickets stay, as launches that are under way leave them."""
        table = self.cache.device.zeros(len(self._table), width, dtype=torch.int32)
        pages = [_NO_PAGES] * len(table)
        self._pages, self._table, self._size = pages, table, _NO_SIZE
        self._capacity = len(pages), width

    def _set_views(self, size: int, width: int) -> None:
        self.block_table, self.kv_len = self._table[:size, :width], self._kv_len[:size]
        self._tickets = self._all_tickets[:size] if self.cache.device.is_gpu else None
        self._size = size, width

    def _write_pages(self, row: int, pages: list[int]) -> None:
        self._pages[row] = _NO_PAGES  # until they stand there, if an interrupt comes in between
        # No kernel reads past kv_len + num_nodes, where the scratch pages lie.
        scratch = [SCRATCH_PAGE] * (self._table.shape[1] - len(pages))
        written = torch.tensor(pages + scratch, dtype=torch.int32)
        self.cache.device.upload(written, self._table[row])
        self._pages[row] = pages, len(pages)

    def _write_length(self, row: int, length: int) -> None:
        self._lengths[row] = _UNKNOWN
        self._kv_len[row].fill_(length)
        self._lengths[row] = length


def _table_width(num_pages: int) -> int:
    return max(8, power_of_two(num_pages))
