"""One drafting round of a batch: static buffers, and the steps that a graph can run again.

B sequences, K = top_k, R rows of the draft head, W = 2 words of ancestor bits, C pool entries.
Level 0 is the root's children; level l is run from the frontier of level l - 1. Draft node l*K + j
(what ancestor bits and cache rows count) is node j of the frontier of level l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from specrt import ops
from specrt.cache import CacheBatch, KVCache
from specrt.device import Device
from specrt.draft.coupling import Coupling, draft_tiles, expand_scratch
from specrt.draft.fspad.layer import DraftLayer, Rows
from specrt.draft.fspad.pairs import BIT_WORDS, MAX_PAIRS, PairTable
from specrt.draft.fspad.tree_control import LevelControl
from specrt.types import Proposal, SequenceState


@dataclass(frozen=True)
class RoundKey:
    """What a round's buffers are sized for."""

    batch: int
    table_width: int
    top_k: int
    is_coupled: bool


@dataclass(frozen=True)
class Frontier:
    """The K best children that a level made, in descending order of score."""

    tokens: torch.Tensor
    """``[B, K]`` int32"""
    scores: torch.Tensor
    """``[B, K]`` float32: log-probability of the path."""
    candidates: torch.Tensor
    """``[B, K]`` int32: their places in the pool."""
    source: torch.Tensor
    """``[B, K]`` int32: the parent's row in the level that made them."""
    ancestors: torch.Tensor
    """``[B, K, W]`` int64 bits over draft nodes."""

    @classmethod
    def make(cls, batch: int, width: int, device: Device) -> Frontier:
        """Empty buffers."""
        tokens, candidates, source = device.zeros(3, batch, width, dtype=torch.int32)
        bits = device.zeros(batch, width, BIT_WORDS, dtype=torch.int64)
        return cls(tokens, device.zeros(batch, width), candidates, source, bits)

    @classmethod
    def root(cls, batch: int, device: Device) -> Frontier:
        """What level 0 grows from: the root, which is no draft node."""
        one = cls.make(batch, 1, device)
        one.candidates.fill_(-1)
        return one


@dataclass(frozen=True)
class Pool:
    """Every child that was scored: K of the root, then K * K of each level."""

    tokens: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def make(cls, batch: int, size: int, device: Device) -> Pool:
        """Empty buffers ``[B, C]``."""
        tokens, parents = device.zeros(2, batch, size, dtype=torch.int32)
        return cls(tokens, parents, device.zeros(batch, size))


@dataclass(frozen=True)
class Choice:
    """The nodes kept of a pool: the fields of a :class:`Proposal`, and their scores."""

    draft_tokens: torch.Tensor
    parents: torch.Tensor
    num_nodes: torch.Tensor
    node_scores: torch.Tensor
    """``[B, N]`` float32: log-probability of the path, best first; the root's is 0."""

    @classmethod
    def make(cls, batch: int, num_nodes: int, device: Device) -> Choice:
        """Empty buffers."""
        tokens, parents = device.zeros(2, batch, num_nodes, dtype=torch.int32)
        counts = device.zeros(batch, dtype=torch.int32)
        return cls(tokens, parents, counts, device.zeros(batch, num_nodes))

    def tree(self, size: int) -> Proposal:
        """The best ``size`` nodes, valid until the next round (views, where that is enough)."""
        return Proposal(
            draft_tokens=self.draft_tokens[:, :size],
            parents=self.parents[:, :size],
            num_nodes=self.num_nodes.clamp(max=size),
        )


def num_candidates(num_levels: int, top_k: int) -> int:
    """Children that so many levels score of a sequence."""
    return top_k + (num_levels - 1) * top_k**2


class Places(NamedTuple):
    """What a round's steps read of its batch beside the pairs."""

    block_table: torch.Tensor
    """Of the draft caches."""
    roots: torch.Tensor
    coupling: Coupling | None
    control: LevelControl | None = None
    """Whose trees grow on, and who decides on it; None: all do."""

    @property
    def is_open(self) -> torch.Tensor | None:
        """``[B]`` int32: a level that nobody wants is launched and streams nothing. None: all."""
        return None if self.control is None else self.control.control.is_open


class RoundBuffers:
    """The buffers of rounds of one :class:`RoundKey` and the steps over them.

    Args:
        key: sizes.
        layer: the drafter's layer, on whose device they are.
        pairs: what a round begins with, of as many sequences.
        max_levels: beyond the root's children.
    """

    def __init__(self, key: RoundKey, layer: DraftLayer, pairs: PairTable, max_levels: int) -> None:
        batch, width, device = key.batch, key.top_k, layer.device
        self.key, self.pairs = key, pairs
        self._layer, self._device = layer, device
        self._work = layer.activations(batch * max(MAX_PAIRS, width), batch * width)
        hidden, dtype = layer.padded.hidden_size, layer.activation_dtype
        self._regressed = [device.zeros(batch * width, hidden, dtype=dtype) for _ in range(2)]
        block_table = device.zeros(batch, key.table_width, dtype=torch.int32)
        coupling = pairs.coupling if key.is_coupled else None
        self._staged = Places(block_table, pairs.roots, coupling)
        self._zero, self._one, self._width = device.there(
            torch.tensor([[0], [1], [width]], dtype=torch.int32).repeat(1, batch)
        )
        levels = torch.arange(max_levels + 1, dtype=torch.int32) - 1  # what level l's rows stand on
        self._level_depth = device.there(levels[:, None, None].repeat(1, batch, width))
        self._level_first = device.there((levels * width)[:, None].repeat(1, batch))
        self._root = Frontier.root(batch, device)
        self._frontiers = [Frontier.make(batch, width, device) for _ in range(2)]
        self._pool = Pool.make(batch, num_candidates(1 + max_levels, width), device)
        self._scratch = expand_scratch(batch, width, len(layer.weights.head), width, device)
        self._tiles = None
        if device.is_gpu and layer.has_maxima:
            self._tiles = draft_tiles(batch * width, len(layer.weights.head), device)
        self._choices: dict[int, Choice] = {}
        # Where some trees may not grow on: ln of the chance that a path goes on into the last
        # level, given that it came so far.
        self._level_score = device.zeros(batch)

    def stage(
        self,
        states: Sequence[SequenceState],
        batch: CacheBatch,
        pending: Sequence[torch.Tensor],
    ) -> int:
        """Copy in what a round of the host's starts from; as :meth:`PairTable.stage`."""
        is_coupled = self._staged.coupling is not None
        most = self.pairs.stage(states, batch, pending, is_coupled=is_coupled)
        self._staged.block_table.copy_(batch.block_table)
        return most

    # --- steps: nothing but launches on static buffers ----------------------------------------

    def extend(self, most: int, cache: KVCache, places: Places | None = None) -> None:
        """Run the waiting pairs, and score the root's children.

        Rows lie with each sequence's last pair first, because that one alone goes on to attention,
        MLP and head; the earlier ones only leave keys and values.

        Args:
            most: pairs of a sequence, at most.
            cache: for the drafter's keys and values.
            places: None: as staged.
        """
        at, pairs, size = places or self._staged, self.pairs, self.key.batch
        last, q = self.append_pairs(most, cache, at)
        regressed, maxima = self._regressed[0][:size], self._maxima(0, size, at)
        logits = self._layer.finish(
            q, pairs.last_bits, last, cache, self._work, regressed, at.is_open, maxima
        )
        self._score(0, logits.view(size, 1, -1), at, maxima)

    def append_pairs(self, most: int, cache: KVCache, places: Places) -> tuple[Rows, torch.Tensor]:
        """Keys and values of the waiting pairs; rows and queries of the last ones."""
        pairs, size, work, layer = self.pairs, self.key.batch, self._work, self._layer
        tokens, source = pairs.rows(most)
        layer.sample_features(tokens, source, pairs.features, work)
        table, num_earlier = places.block_table, pairs.num_earlier
        if most > 1:
            depth = pairs.path[:, : most - 1]
            earlier = Rows(depth, pairs.kv_len, self._zero, num_earlier, table)
            layer.append(size, earlier, cache, work, is_by_pair=True)
        last = Rows(num_earlier[:, None], pairs.kv_len, num_earlier, self._one, table)
        return last, layer.append(0, last, cache, work)

    def expand(self, level: int, cache: KVCache, places: Places | None = None) -> None:
        """Run the frontier of level ``level - 1`` and score its children."""
        at, size, width = places or self._staged, self.key.batch, self.key.top_k
        above, work = self._frontiers[(level - 1) % 2], self._work
        features = self._regressed[(level - 1) % 2]
        self._layer.sample_features(
            above.tokens.view(-1), above.source.view(-1), features, work, at.is_open
        )
        depth, first = self._level_depth[level], self._level_first[level]
        rows = Rows(depth, self.pairs.kv_len_after, first, self._width, at.block_table)
        q = self._layer.append(0, rows, cache, work)
        regressed, maxima = self._regressed[level % 2], self._maxima(level, size * width, at)
        logits = self._layer.finish(
            q, above.ancestors, rows, cache, work, regressed, at.is_open, maxima
        )
        self._score(level, logits.view(size, width, -1), at, maxima)

    def choose(self, num_levels: int, choice: Choice, places: Places | None = None) -> None:
        """Fill ``choice`` with the best nodes of the levels scored so far."""
        at = places or self._staged
        ops.tree_rerank(
            self._pool.tokens,
            self._pool.parents,
            self._pool.scores,
            num_candidates(num_levels, self.key.top_k),
            at.roots,
            choice.draft_tokens,
            choice.parents,
            choice.num_nodes,
            choice.node_scores,
        )

    def _maxima(self, level: int, num_rows: int, places: Places) -> ops.DraftMaxima | None:
        """What the head is to leave of a level's rows, with the noise that they are ranked with."""
        if self._tiles is None:
            return None
        keys, masses = (tiles[:num_rows] for tiles in self._tiles)
        sampling, position = places.coupling or (None, None)
        ids = self._layer.weights.token_ids
        return ops.DraftMaxima(keys, masses, sampling, position, level, ids)

    def _score(
        self, level: int, logits: torch.Tensor, places: Places, maxima: ops.DraftMaxima | None
    ) -> None:
        """Children of the level's nodes from ``logits [B, F, R]``, and the next frontier."""
        above = self._root if level == 0 else self._frontiers[(level - 1) % 2]
        below = self._frontiers[level % 2]
        sampling, position = places.coupling or (None, None)
        control = places.control
        ops.tree_expand(
            logits,
            above.scores,
            above.candidates,
            above.ancestors,
            self._layer.weights.token_ids,
            sampling,
            position,
            level,
            self._scratch,
            self._pool.tokens,
            self._pool.parents,
            self._pool.scores,
            below.tokens,
            below.scores,
            below.candidates,
            below.source,
            below.ancestors,
            is_open=places.is_open,
            level_score=None if control is None else self._level_score,
            maxima=maxima,
            control=None if control is None else control.after(level, self._level_score),
        )

    # --- what Python looks at between steps ---------------------------------------------------

    def choice(self, num_nodes: int) -> Choice:
        """Static buffers for a choice of ``num_nodes`` nodes."""
        known = self._choices.get(num_nodes)
        if known is None:
            made = Choice.make(self.key.batch, num_nodes, self._device)
            known = self._choices[num_nodes] = made
        return known

    def scores(self, level: int) -> npt.NDArray[np.float32]:
        """``[B, K]``: scores of the frontier that ``level`` made, valid until level + 2; NaN on a
        GPU, for which the host does not wait."""
        return self._device.glance(self._frontiers[level % 2].scores)
