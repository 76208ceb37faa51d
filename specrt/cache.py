"""Paged keys and values.

A :class:`KVCache` owns the pages; a :class:`CacheBatch` is the sequences that run together. Forward
passes write rows past ``kv_len``; only :meth:`CacheBatch.commit` makes them part of a sequence, so
that abandoning a round needs no undo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from specrt import ops
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.pages import SCRATCH_PAGE, PageGroup, PagePool, page_groups
from specrt.reuse import power_of_two

__all__ = ["SCRATCH_PAGE", "CacheBatch", "CachedSequence", "KVCache"]

_UNKNOWN = -1  # of a row's length
_NO_SIZE = -1, -1  # of tables of which there are no views
_NO_PAGES: tuple[list[list[int]], int] = [], -1  # no sequence's


@dataclass(eq=False)
class CachedSequence:
    """One sequence's pages and how many of its tokens they hold."""

    tables: list[list[int]] = field(default_factory=lambda: [[]])
    """Of each group of layers, pages in the order of their rows, the scratch page where they were
    given back. A list is only ever extended; giving back puts another one here."""
    length: int = 0

    @property
    def pages(self) -> list[int]:
        """Of the first group; every group's table has as many columns."""
        return self.tables[0]


class KVCache:
    """The pages of one model, in a pool for each group of its layers (:mod:`specrt.pages`).

    Sequences take pages as they need them, the lowest free one first, so that memory that has been
    touched is used again; what a window has passed they give back whenever they take.

    Args:
        config: the model's.
        dtype: of keys and values.
        page_size: tokens.
        device: where to; None: the CPU.
        max_pages: of each group, that sequences may hold together; None: as many as there is memory
            for.
        num_again: rows before a sequence's length that may be run again, and so what they see is
            kept.

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
        num_again: int = 0,
    ) -> None:
        if max_pages is not None and max_pages < 1:
            raise ValueError(f"max_pages: expected at least 1, got {max_pages}")
        self.page_size, self.num_again = page_size, num_again
        self.device = device or Device()
        self.pools = tuple(
            PagePool(group, index, self.device, max_pages)
            for index, group in enumerate(page_groups(config, dtype, page_size))
        )
        self._windowed = [pool for pool in self.pools if pool.group.window is not None]
        self._places = {
            layer: (group, place)
            for group, pool in enumerate(self.pools)
            for place, layer in enumerate(pool.group.layers)
        }

    @property
    def groups(self) -> tuple[PageGroup, ...]:
        """Of layers, each of which has a pool."""
        return tuple(pool.group for pool in self.pools)

    @property
    def kv(self) -> torch.Tensor:
        """``[layers, 2, P, page_size, Hkv, d]``: the first group's, which has all layers where none
        has a window."""
        return self.pools[0].kv

    @property
    def max_pages(self) -> int | None:
        """That sequences may hold of the first group."""
        return self.pools[0].max_pages

    @property
    def num_pages(self) -> int:
        """Pages for sequences, free ones included, of all groups."""
        return sum(pool.num_pages for pool in self.pools)

    @property
    def num_free_pages(self) -> int:
        """Pages no sequence holds."""
        return sum(pool.num_free_pages for pool in self.pools)

    @property
    def num_held_pages(self) -> int:
        """Pages that sequences hold."""
        return sum(pool.num_held_pages for pool in self.pools)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        return sum(pool.group.page_bytes for pool in self.pools)

    def group_of(self, layer: int) -> int:
        """Whose tables a layer's rows are found by (:attr:`CacheBatch.block_tables`)."""
        return self._places[layer][0]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value pages of a layer, each ``[P, page_size, Hkv, d]``."""
        group, place = self._places[index]
        kv = self.pools[group].kv
        return kv[place, 0], kv[place, 1]

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages of a group that hold ``num_tokens`` rows of one sequence, if all are kept."""
        return -(-num_tokens // self.page_size)

    def can_hold(self, num_tokens: int, num_rows: int) -> bool:
        """Whether ``max_pages`` lets one more sequence be so long (memory is known by trying).

        Args:
            num_tokens: it will have pages for.
            num_rows: that are run at a time, at most.
        """
        return all(
            pool.can_take(pool.group.num_pages_at_once(num_tokens, num_rows)) for pool in self.pools
        )

    def open(self, num_tokens: int = 0) -> CachedSequence:
        """A new sequence, with pages for ``num_tokens`` rows.

        Raises:
            MemoryError: as :meth:`reserve`.
        """
        sequence = CachedSequence([[] for _ in self.pools])
        self.reserve(sequence, num_tokens)
        return sequence

    def reserve(self, sequence: CachedSequence, num_tokens: int) -> None:
        """Give a sequence the pages it lacks to write ``num_tokens`` rows in all.

        Raises:
            MemoryError: ``max_pages`` or memory has no room for them; says how much was needed.
                What the sequence may still see is as it was.
            RuntimeError: the cache's memory was given back.
        """
        num_columns = self.num_pages_for(num_tokens)
        if num_columns <= len(sequence.pages):
            return
        if self._windowed:
            self.release(sequence)
        for pool, pages in zip(self.pools, sequence.tables, strict=True):
            pool.make_room(num_columns - len(pages))
        # The first one last: by its columns a sequence's room is told, if an interrupt comes.
        for pool in reversed(self.pools):
            pool.take(sequence.tables, num_columns)

    def release(self, sequence: CachedSequence) -> None:
        """Give back what the windows of all rows that are still to be launched have passed.

        Those that are under way find it as it was: who takes these pages writes them later. So it
        does not matter how far a device is ahead of the length.
        """
        for pool in self._windowed:
            pool.release(sequence.tables, sequence.length - self.num_again)

    def close(self, sequence: CachedSequence) -> None:
        """Give a sequence's pages back; closed again it has none to give."""
        for pool, pages in zip(self.pools, list(sequence.tables), strict=True):
            pool.give_back(sequence.tables, len(pages), ())

    def fix(self, *num_pages: int) -> None:
        """Have so many pages of each group, at once and for good, or as many as there are already.

        Raises:
            MemoryError: there is no room for them.
        """
        for pool, count in zip(self.pools, num_pages, strict=True):
            pool.fix(count)

    def retire(self) -> None:
        """Give the memory back for good, if no sequence holds a page of it."""
        if self.num_held_pages == 0:
            for pool in self.pools:
                pool.retire()


class CacheBatch:
    """The sequences of one forward pass, as the tables the kernels read.

    ``block_tables``, ``[B, W]`` for each group of layers, and ``kv_len [B]``, all int32, lie where
    the pages do. They are written row by row where something has changed, in memory that moves only
    for more sequences or a larger width than ever before. Lengths are also counted on the host, so
    that nobody waits for a GPU to learn them; while a launched commit has not been heard of, the
    device's are ahead of them.

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
            (stands, count), tables = self._pages[row], sequence.tables
            if count != len(tables[0]) or stands != tables:  # lists that are the same are equal
                self._write_pages(row, tables)
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
        pools, counts = self.cache.pools, (num_path, self.kv_len, self._tickets)
        for pool, table in zip(pools[1:], self.block_tables[1:], strict=True):
            ops.kv_commit(pool.kv, table, path, *counts, is_last=False)
        ops.kv_commit(pools[0].kv, self.block_table, path, *counts)

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
        tables = self.cache.device.zeros(len(self.cache.pools), rows, width, dtype=torch.int32)
        kv_len = self.cache.device.zeros(rows, dtype=torch.int32)
        # The CUDA kernel's, zero between launches; made here, so that committing allocates nothing.
        tickets = torch.zeros_like(kv_len)
        # All or none of them (Ctrl-C comes behind calls); the size, that views are made of them.
        self._tables, self._kv_len, self._all_tickets = tables, kv_len, tickets
        self._capacity = rows, width  # asking a tensor takes longer than all else of an update
        # What stands in the rows: pages (the lists themselves, and how many of them), and kv_len.
        self._pages, self._lengths, self._size = [_NO_PAGES] * rows, [0] * rows, _NO_SIZE

    def _widen(self, width: int) -> None:
        """More columns; lengths and tickets stay, as launches that are under way leave them."""
        num_groups, num_rows, _ = self._tables.shape
        tables = self.cache.device.zeros(num_groups, num_rows, width, dtype=torch.int32)
        pages = [_NO_PAGES] * num_rows
        self._pages, self._tables, self._size = pages, tables, _NO_SIZE
        self._capacity = len(pages), width

    def _set_views(self, size: int, width: int) -> None:
        self.block_tables = self._tables[:, :size, :width].unbind()
        self.block_table, self.kv_len = self.block_tables[0], self._kv_len[:size]
        self._tickets = self._all_tickets[:size] if self.cache.device.is_gpu else None
        self._size = size, width

    def _write_pages(self, row: int, tables: Sequence[list[int]]) -> None:
        self._pages[row] = _NO_PAGES  # until they stand there, if an interrupt comes in between
        # No kernel reads past kv_len + num_nodes, where the scratch pages lie.
        width, stands = self._tables.shape[2], list(tables)
        rows = [[*pages, *[SCRATCH_PAGE] * (width - len(pages))] for pages in stands]
        self.cache.device.upload(torch.tensor(rows, dtype=torch.int32), self._tables[:, row])
        self._pages[row] = stands, len(stands[0])

    def _write_length(self, row: int, length: int) -> None:
        self._lengths[row] = _UNKNOWN
        self._kv_len[row].fill_(length)
        self._lengths[row] = length


def _table_width(num_pages: int) -> int:
    return max(8, power_of_two(num_pages))
