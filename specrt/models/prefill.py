"""Prompts: known tokens of one sequence, in pieces as large as pays, each one pass of the target.

A pass takes chains of up to 128 rows, so a larger piece is a batch of chains, each of which goes on
where the one before it ends:

    300 tokens behind L   0 .. 111   112 .. 223   224 .. 299, and 36 rows that do not count
    ``kv_len``            L          L + 112      L + 224
    pages                 the sequence's, for all of them

``linear`` sees all rows at once: weights are read once a piece. Keys and values of all rows go into
the cache before any row attends, so what a chain finds below its ``kv_len`` is what the chains
before it have just left there. By law 1 a row has the bits that it has in any other cut.

Nothing here waits for a device: the host knows tokens, counts and lengths, which go up in one copy
a call, and a piece's rows lie where they belong, so committing moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from specrt.cache import CacheBatch
from specrt.device import Device
from specrt.tree import MAX_NODES, ChainTrees
from specrt.types import DraftTree

GPU_PIECE = 512
"""Rows of a piece on a GPU at the most. Weights are read in the time of some 180 rows' products, so
that reading hides behind them; beyond, only the launches' beginnings and ends would be saved."""
_GPU_ROWS = 16
"""Chains have a multiple of so many rows on a GPU, where a piece's size is what steps are captured
for, and rows that do not count cost little."""


@dataclass(frozen=True)
class Cut:
    """How a piece is cut: chains of equal length, the last one not always full."""

    start: int
    """Its first token's index."""
    count: int
    num_chains: int
    length: int
    """Rows of a chain, at most 128."""

    @property
    def rows(self) -> int:
        """Those that do not count too."""
        return self.num_chains * self.length

    @property
    def counts(self) -> list[int]:
        """Of each chain, the rows that count."""
        firsts = range(0, self.rows, self.length)
        return [min(self.length, self.count - first) for first in firsts]


def cuts(num_tokens: int, most: int, unit: int = 1, most_of_chain: int = MAX_NODES) -> list[Cut]:
    """The pieces of a prompt.

    Args:
        num_tokens: of the prompt.
        most: of a piece; a multiple of ``most_of_chain``.
        unit: of which a chain's length is a multiple; divides ``most_of_chain``.
        most_of_chain: rows of a chain at the most.
    """
    found = []
    for start in range(0, num_tokens, most):
        count = min(most, num_tokens - start)
        num_chains = -(-count // most_of_chain)
        length = -(-count // (num_chains * unit)) * unit
        found.append(Cut(start, count, num_chains, length))
    return found


@dataclass(frozen=True)
class ChainTables:
    """Where the rows of a piece stand: C chains of one sequence."""

    kv_len: torch.Tensor
    """``[C]`` int32"""
    block_tables: tuple[torch.Tensor, ...]
    """``[C, max_pages]`` int32, the sequence's, C times, of each group of layers."""


@dataclass(frozen=True)
class Piece:
    """A piece on its device, ready to be run."""

    cut: Cut
    tree: DraftTree
    """``[C, length]``"""
    tables: ChainTables
    path: torch.Tensor
    """``[1, rows]`` int32: its rows lie in their places."""
    num_path: torch.Tensor
    """``[1]`` int32: those that count."""

    def slices(
        self, taps: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[int, Mapping[str, torch.Tensor]]]:
        """Chain by chain, the index of the first token and ``[1, n, H]`` of the rows that count.

        Args:
            taps: of the piece, ``[C, length, H]``.
        """
        for chain, count in enumerate(self.cut.counts):
            rows = {name: tap[chain : chain + 1, :count] for name, tap in taps.items()}
            yield self.cut.start + chain * self.cut.length, rows


class Prompts:
    """Makes pieces of prompts.

    Args:
        device: where they are run.
        most: rows of a piece, a multiple of ``most_of_chain``; None: as many as pay there.
        most_of_chain: rows of a chain, a multiple of 16.
    """

    def __init__(
        self, device: Device, most: int | None = None, most_of_chain: int = MAX_NODES
    ) -> None:
        self._device = device
        self._most = most or (GPU_PIECE if device.is_gpu else MAX_NODES)
        self._most_of_chain = most_of_chain
        self._unit = _GPU_ROWS if device.is_gpu else 1
        self._chains = ChainTrees(device)
        self._path = device.there(torch.arange(self._most, dtype=torch.int32)[None])

    def pieces(self, ids: Sequence[int], batch: CacheBatch) -> Iterator[Piece]:
        """What is to be run, and committed, in this order.

        Args:
            ids: tokens that follow what the one sequence of ``batch`` holds.
            batch: its cache.
        """
        found = cuts(len(ids), self._most, self._unit, self._most_of_chain)
        length = batch.sequences[0].length
        rows = [_staged(cut, ids, length) for cut in found]
        staged = torch.tensor([number for row in rows for number in row], dtype=torch.int32)
        parts = self._device.there(staged).split([len(row) for row in rows])
        for cut, part in zip(found, parts, strict=True):
            yield self._piece(cut, part, batch)

    def _piece(self, cut: Cut, staged: torch.Tensor, batch: CacheBatch) -> Piece:
        chains = cut.num_chains
        tokens, num_nodes, kv_len, num_path = staged.split([cut.rows, chains, chains, 1])
        tree = self._chains.of(tokens.view(chains, cut.length))
        return Piece(
            cut,
            replace(tree, num_nodes=num_nodes),
            ChainTables(kv_len, tuple(one.expand(chains, -1) for one in batch.block_tables)),
            self._path[:, : cut.rows],
            num_path,
        )


def _staged(cut: Cut, ids: Sequence[int], length: int) -> list[int]:
    """A piece's numbers, of a sequence that holds ``length`` tokens before ``ids``."""
    firsts = range(length + cut.start, length + cut.start + cut.rows, cut.length)
    tokens = [*ids[cut.start : cut.start + cut.count], *[0] * (cut.rows - cut.count)]
    return [*tokens, *cut.counts, *firsts, cut.count]
