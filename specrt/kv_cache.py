"""Pages of keys and values, and the sequences that hold them.

A sequence takes pages as it grows, may begin with pages that others hold (:mod:`specrt.prefixes`),
and gives all back at its end.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.pages import PageGroup, PagePool, page_groups
from specrt.prefixes import PrefixTree


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
        self._prefixes = PrefixTree(self.pools, num_again)
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
        """Pages no sequence holds, those that are kept for later ones among them."""
        return sum(pool.num_free_pages for pool in self.pools)

    @property
    def num_held_pages(self) -> int:
        """Pages that sequences hold."""
        return sum(pool.num_held_pages for pool in self.pools)

    @property
    def num_shared_pages(self) -> int:
        """Pages that are kept for later sequences, held by some now or not."""
        return sum(pool.num_shared_pages for pool in self.pools)

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

    def can_hold(self, num_tokens: int, num_rows: int, num_held: int = 0) -> bool:
        """Whether ``max_pages`` lets one more sequence be so long (memory is known by trying).

        Args:
            num_tokens: it will have pages for.
            num_rows: that are run at a time, at most.
            num_held: pages it will share that others hold already (:meth:`find`).
        """
        for pool in self.pools:
            needed = pool.group.num_pages_at_once(num_tokens, num_rows)
            if not pool.can_take(needed - (num_held if pool.group.window is None else 0)):
                return False
        return True

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
            self._make_room(pool, num_columns - len(pages))
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
        self._prefixes.trim()

    def close(self, sequence: CachedSequence) -> None:
        """Give a sequence's pages back; closed again it has none to give."""
        for pool, pages in zip(self.pools, list(sequence.tables), strict=True):
            pool.give_back(sequence.tables, len(pages), ())
        self._prefixes.trim()

    # --- beginnings that sequences share ------------------------------------------------------

    def share(self, max_tokens: int | None) -> None:
        """Let sequences share what they begin with; none do before.

        Args:
            max_tokens: that are kept, in whole pages of each group, while no sequence holds them;
                None: as many as there are pages for. 0: nothing is shared.
        """
        most = None if max_tokens is None else self.num_pages_for(max_tokens)
        self._prefixes.max_kept_pages = most
        self._prefixes.trim()

    @property
    def is_shared(self) -> bool:
        """Whether :meth:`share` lets them."""
        return self._prefixes.max_kept_pages != 0

    def find(self, salt: Hashable, ids: Sequence[int], most: int) -> tuple[int, int]:
        """How many of a sequence's first tokens, ``most`` at most, are there already.

        Args:
            salt: nothing is shared with those of another.
            ids: its tokens.
            most: less than all, for one must be run.

        Returns:
            How many, and of their pages how many other sequences hold.
        """
        found = self._prefixes.find(salt, ids, most)
        return found.num_tokens, self._prefixes.num_held(found)

    def take_up(
        self, sequence: CachedSequence, salt: Hashable, ids: Sequence[int], most: int
    ) -> int:
        """Begin a sequence that has no pages with what :meth:`find` finds, and say how many.

        Raises:
            MemoryError: there is no page for the end of it; the sequence has none.
        """
        found = self._prefixes.find(salt, ids, most)
        if found.num_tokens == 0:
            return 0
        self._prefixes.hold(sequence.tables, found)
        if found.num_tokens % self.page_size:
            try:
                for pool in self.pools:
                    self._make_room(pool, 1)
            except MemoryError:
                self.close(sequence)
                raise
            for pool in self.pools:
                pool.copy_last(sequence.tables)
        sequence.length = found.num_tokens
        return sequence.length

    def keep(
        self, sequence: CachedSequence, salt: Hashable, ids: Sequence[int], *, is_over: bool = False
    ) -> None:
        """Keep what a sequence holds for later ones that begin with the same.

        Args:
            sequence: whose rows they are.
            salt: as for :meth:`find`.
            ids: the tokens of its rows, as far as they are known.
            is_over: it writes nothing any more. Else whole pages of a prompt are kept; without
                windows once all of it is there, for nobody looks before.
        """
        num_rows = min(sequence.length, len(ids))
        is_due = is_over or self._windowed or num_rows >= len(ids) - 1
        if self.is_shared and is_due:
            self._prefixes.keep(salt, ids, sequence.tables, num_rows, is_over=is_over)

    def forget(self) -> None:
        """Keep nothing of what was kept so far."""
        self._prefixes.clear()

    # ------------------------------------------------------------------------------------------

    def _make_room(self, pool: PagePool, num_more: int) -> None:
        """See to it that so many pages of a group are nobody's.

        Raises:
            MemoryError, RuntimeError: as :meth:`reserve`.
        """
        index = self.pools.index(pool)
        self._prefixes.give_back(index, pool.num_in_the_way(num_more))
        try:
            pool.make_room(num_more)
        except MemoryError:
            if not pool.num_kept_pages or not pool.can_take(num_more):
                raise
            self._prefixes.give_back(index, num_more)
            pool.make_room(num_more)

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
            self.forget()
            for pool in self.pools:
                pool.retire()
