"""Paged keys and values.

A :class:`KVCache` owns the pages; a :class:`CacheBatch` is the sequences that run together. Forward
passes write rows past ``kv_len``; only :meth:`CacheBatch.commit` makes them part of a sequence, so
that abandoning a round needs no undo.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specrt import ops
from specrt.kv_cache import CachedSequence, KVCache
from specrt.pages import SCRATCH_PAGE
from specrt.reuse import power_of_two

__all__ = ["SCRATCH_PAGE", "CacheBatch", "CachedSequence", "KVCache"]

_UNKNOWN = -1  # of a row's length
_NO_SIZE = -1, -1  # of tables of which there are no views
_NO_PAGES: tuple[list[list[int]], int] = [], -1  # no sequence's


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
