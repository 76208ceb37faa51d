"""Beginnings of sequences: pages that were written once, for all that begin with the same tokens.

A tree of pages by their tokens for each salt. A node is up to a page of tokens behind its parent's,
and the page of each group that holds their keys and values. Tokens are compared, not hashes of
them, so nobody ever finds another text's pages.

    salt ── 64 tokens ─┬─ 64 tokens ── 30 tokens
                       └─ 64 others

By law 1 a row has the same bits however it was computed: in a piece of a prompt, in a tree that was
accepted, in whatever batch. So it does not matter whose rows are found, nor whether they were a
prompt's or an answer's.

A sequence holds the pages of whole nodes and writes behind them; of the last node, which it may
share in part, it has a copy. So nobody writes a page that another may read. What no sequence holds
goes when pages are needed, or are more than may be kept: what was used longest ago first, and no
node before those below it.

Rows behind L of layers with a window see little of what is before it. So a page of such layers may
be missing from a node, and a beginning is of use if all those are there that are seen from its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from specrt.pages import SCRATCH_PAGE, PagePool


class _Node:
    """Some tokens behind a parent's, and their pages."""

    __slots__ = ("children", "key", "pages", "parent")

    def __init__(self, key: Hashable, parent: _Node | None, num_groups: int) -> None:
        self.key = key  # its tokens; a salt where there is no parent
        self.parent = parent
        self.children: dict[tuple[int, ...], _Node] = {}  # by their tokens
        self.pages = [SCRATCH_PAGE] * num_groups
        """Of each group; the scratch page: none."""

    @property
    def is_hollow(self) -> bool:
        """Whether it has neither pages nor children."""
        return not self.children and not any(self.pages)


@dataclass(frozen=True)
class Prefix:
    """A beginning that was found."""

    nodes: tuple[_Node, ...]
    """From the first tokens on; the last one may be longer than what was found."""
    num_tokens: int


class PrefixTree:
    """The shared pages of a cache.

    Everything here is done at once or not at all where Ctrl-C comes (:class:`PagePool`), page by
    page: a node that lacks one is not gone through, and goes with those below it.

    Args:
        pools: the cache's.
        num_again: rows before a sequence's length that it may write again, which are not shared
            while it runs, and as which their window is kept.
    """

    def __init__(self, pools: Sequence[PagePool], num_again: int) -> None:
        self._pools = pools
        self._size = pools[0].group.page_size
        self._num_again = num_again
        self._tops: dict[Hashable, _Node] = {}
        # All nodes, who was used longest ago first. Whoever is used is used together with all above
        # it, which go later. Not so what only a window sees: there the end is what is looked for.
        self._order: OrderedDict[_Node, None] = OrderedDict()
        self._by_window: OrderedDict[_Node, None] = OrderedDict()
        self.max_kept_pages: int | None = 0
        """Pages of a group that are kept while no sequence holds them; None: all, 0: nothing is
        shared at all."""

    # --- who begins alike ---------------------------------------------------------------------

    def find(self, salt: Hashable, ids: Sequence[int], most: int) -> Prefix:
        """The longest beginning of ``ids``, of ``most`` tokens at most, whose pages are there."""
        nodes, length, node = list[_Node](), 0, self._tops.get(salt)
        most -= self._num_again
        while node is not None and length < most:
            tokens = tuple(ids[length : min(length + self._size, most)])
            child = node.children.get(tokens)
            count = len(tokens)
            if child is None:
                child, count = _nearest(node, tokens)
            if child is None or not self._has_full(child):
                break
            nodes.append(child)
            length += count
            node = child if count == self._size else None
        while nodes and not self._has_seen(nodes, length):
            nodes.pop()
            length = len(nodes) * self._size
        return Prefix(tuple(nodes), length)

    def num_held(self, prefix: Prefix) -> int:
        """Whole pages of each group without a window that some sequence holds anyway."""
        index = next((i for i, pool in enumerate(self._pools) if pool.group.window is None), None)
        if index is None:
            return 0
        whole = prefix.nodes[: prefix.num_tokens // self._size]
        return sum(self._pools[index].is_held(node.pages[index]) for node in whole)

    def hold(self, tables: list[list[int]], prefix: Prefix) -> None:
        """A sequence without pages begins with these; the last one must be copied before it is
        written to (:meth:`PagePool.copy_last`)."""
        nodes = prefix.nodes
        # The first group last, by whose columns a sequence's room is told.
        for index, pool in reversed(list(enumerate(self._pools))):
            num_hidden = self._num_hidden(pool, prefix.num_tokens)
            hidden = [SCRATCH_PAGE] * min(num_hidden, len(nodes))
            pool.hold(tables, [*hidden, *(node.pages[index] for node in nodes[num_hidden:])])
        self._touch(nodes)

    def keep(
        self,
        salt: Hashable,
        ids: Sequence[int],
        tables: list[list[int]],
        num_rows: int,
        *,
        is_over: bool,
    ) -> None:
        """Keep pages of a sequence, those of whole columns while it runs.

        Where they are kept already it holds those from now on, and its own are free.

        Args:
            salt: whose beginnings it may share.
            ids: its tokens.
            tables: its pages of each group, which hold the rows of the tokens.
            num_rows: rows that are committed.
            is_over: it writes nothing any more.
        """
        count = num_rows if is_over else (num_rows - self._num_again) // self._size * self._size
        if count <= 0:
            return
        top = self._tops.get(salt)
        if top is None:
            top = self._tops[salt] = _Node(salt, None, len(self._pools))
        node, nodes = top, list[_Node]()
        for first in range(0, count, self._size):
            tokens = tuple(ids[first : min(first + self._size, count)])
            child = node.children.get(tokens) or self._add(node, tokens)
            if child is None:
                break
            self._fill(child, tables, first // self._size, len(tokens))
            nodes.append(child)
            node = child
        self._touch(nodes)
        self._prune(node)

    # --- what goes ----------------------------------------------------------------------------

    def trim(self) -> None:
        """Keep no more than may be kept."""
        if self.max_kept_pages is None:
            return
        for index, pool in enumerate(self._pools):
            self.give_back(index, pool.num_kept_pages - self.max_kept_pages)

    def give_back(self, index: int, count: int) -> None:
        """Free so many kept pages of a group, if there are, what was used longest ago first."""
        pool, before = self._pools[index], None
        left = pool.num_kept_pages - count
        # Once, but where an interrupt has left the order as it should not be.
        while left < pool.num_kept_pages != before:
            before = pool.num_kept_pages
            for node in self._oldest(index, before - left):
                self._give_up(node, index)

    def clear(self) -> None:
        """Nobody finds any of it any more; what sequences hold goes once they let go of it."""
        self._tops = {}
        for index, pool in enumerate(self._pools):
            self.give_back(index, pool.num_kept_pages)

    # ------------------------------------------------------------------------------------------

    def _oldest(self, index: int, count: int) -> Sequence[_Node]:
        """Nodes to be given up, in this order, for so many pages of a group."""
        pool, held, found = self._pools[index], list[_Node](), dict[_Node, None]()
        is_full = pool.group.window is None
        order = self._order if is_full else self._by_window
        for node in order:
            page = node.pages[index]
            if pool.is_held(page):
                held.append(node)
            elif not is_full or found.keys() >= set(node.children.values()):
                found[node] = None
                count -= page != SCRATCH_PAGE
            if count == 0:
                break
        for node in held:  # they are in use, and need not be looked at again soon
            order.move_to_end(node)
        return tuple(found)

    def _num_hidden(self, pool: PagePool, num_tokens: int) -> int:
        return pool.group.num_hidden(num_tokens - self._num_again)

    def _has_full(self, node: _Node) -> bool:
        """Whether the pages are there that are never given back."""
        return all(
            page != SCRATCH_PAGE or pool.group.window is not None
            for page, pool in zip(node.pages, self._pools, strict=True)
        )

    def _has_seen(self, nodes: Sequence[_Node], num_tokens: int) -> bool:
        """Whether the pages are there that rows behind so many tokens see."""
        return all(
            node.pages[index] != SCRATCH_PAGE
            for index, pool in enumerate(self._pools)
            if pool.group.window is not None
            for node in nodes[self._num_hidden(pool, num_tokens) :]
        )

    def _touch(self, nodes: Sequence[_Node]) -> None:
        for node in reversed(nodes):
            self._order.move_to_end(node)
        for node in nodes:
            self._by_window.move_to_end(node)

    def _add(self, parent: _Node, tokens: tuple[int, ...]) -> _Node | None:
        """A new child; None if a longer one holds all of it."""
        size = len(tokens)
        if size < self._size and any(key[:size] == tokens for key in parent.children):
            return None
        node = _Node(tokens, parent, len(self._pools))
        self._order[node] = self._by_window[node] = None
        parent.children[tokens] = node
        tails = [key for key in parent.children if len(key) < size and key == tokens[: len(key)]]
        for key in tails:  # of no use any more
            self._drop(parent.children[key])
        return node

    def _fill(self, node: _Node, tables: list[list[int]], column: int, num_tokens: int) -> None:
        """Give a node what it lacks of a sequence's pages, and the sequence what it has."""
        for index, pool in enumerate(self._pools):
            page, kept = tables[index][column], node.pages[index]
            if page in (SCRATCH_PAGE, kept) or pool.is_shared(page):
                continue
            if kept == SCRATCH_PAGE:
                pool.keep(node.pages, page)
            elif num_tokens == self._size:
                pool.swap(tables, column, kept)

    def _give_up(self, node: _Node, index: int) -> None:
        """Free a node's page of a group, if it may be."""
        pool, page = self._pools[index], node.pages[index]
        if pool.is_held(page):
            return
        if pool.group.window is None:
            if not node.children:
                self._drop(node)
            return
        if page != SCRATCH_PAGE:
            pool.forget(node.pages)
        self._prune(node)

    def _drop(self, node: _Node) -> None:
        """Free all pages of a node that no sequence holds."""
        for pool, page in zip(self._pools, list(node.pages), strict=True):
            if page != SCRATCH_PAGE and not pool.is_held(page):
                pool.forget(node.pages)
        self._prune(node)

    def _prune(self, node: _Node | None) -> None:
        """Forget a node that has nothing, and those above it that have nothing besides."""
        while node is not None and node.is_hollow:
            siblings: dict[Any, _Node] = self._tops
            if node.parent is not None:
                siblings = node.parent.children
            if siblings.get(node.key) is node:
                del siblings[node.key]
            self._by_window.pop(node, None)
            self._order.pop(node, None)
            node = node.parent


def _nearest(node: _Node, tokens: tuple[int, ...]) -> tuple[_Node | None, int]:
    """The child that begins with most of ``tokens``, and with how many."""
    best, most = None, 0
    for key, child in node.children.items():
        if key[0] != tokens[0]:
            continue
        count = next(
            (i for i, (one, two) in enumerate(zip(key, tokens, strict=False)) if one != two),
            min(len(key), len(tokens)),
        )
        if count > most:
            best, most = child, count
    return best, most
