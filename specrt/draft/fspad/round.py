"""One drafting round of a batch: static buffers, and the steps that a graph can run again.

B sequences, K = top_k, R rows of the draft head, W = 2 words of ancestor bits, C pool entries.
Level 0 is the root's children; level l is run from the frontier of level l - 1. Draft node l*K + j
(what ancestor bits and cache rows count) is node j of the frontier of level l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specrt import ops
from specrt.cache import CacheBatch
from specrt.draft.coupling import Coupling
from specrt.draft.fspad.layer import Activations, DraftLayer, Rows
from specrt.ops.tree_build import expand_workspace_size
from specrt.tree import MAX_NODES, num_words
from specrt.types import Proposal, SequenceState

MAX_PAIRS = 16
"""Accepted pairs that one captured step takes; more are run before it."""
MAX_LEVELS = 16
"""The largest depth of a tree."""
_WORDS = num_words(MAX_NODES)


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
    def make(cls, batch: int, width: int) -> Frontier:
        """Empty buffers."""

        def ints() -> torch.Tensor:
            return torch.zeros(batch, width, dtype=torch.int32)

        bits = torch.zeros(batch, width, _WORDS, dtype=torch.int64)
        return cls(ints(), torch.zeros(batch, width), ints(), ints(), bits)


@dataclass(frozen=True)
class Pool:
    """Every child that was scored: K of the root, then K * K of each level."""

    tokens: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def make(cls, batch: int, size: int) -> Pool:
        """Empty buffers ``[B, C]``."""
        shape = (batch, size)
        ints = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
        return cls(*ints, torch.zeros(shape))


@dataclass(frozen=True)
class Choice:
    """The nodes kept of a pool: the fields of a :class:`Proposal`, and their scores."""

    draft_tokens: torch.Tensor
    parents: torch.Tensor
    num_nodes: torch.Tensor
    node_scores: torch.Tensor
    """``[B, N]`` float32: log-probability of the path, best first; the root's is 0."""

    @classmethod
    def make(cls, batch: int, num_nodes: int) -> Choice:
        """Empty buffers."""
        ints = torch.zeros(2, batch, num_nodes, dtype=torch.int32)
        counts = torch.zeros(batch, dtype=torch.int32)
        return cls(ints[0], ints[1], counts, torch.zeros(batch, num_nodes))

    def tree(self, size: int) -> Proposal:
        """The best ``size`` nodes, valid until the next round (views, where that is enough)."""
        return Proposal(
            draft_tokens=self.draft_tokens[:, :size],
            parents=self.parents[:, :size],
            num_nodes=self.num_nodes.clamp(max=size),
        )


class RoundBuffers:
    """The buffers of rounds of one :class:`RoundKey` and the steps over them.

    ``pair_path [B, MAX_PAIRS]`` and ``num_pairs [B]``, both int32, commit the staged pairs.

    Args:
        key: sizes.
        layer: the drafter's layer.
        max_levels: beyond the root's children.
    """

    def __init__(self, key: RoundKey, layer: DraftLayer, max_levels: int) -> None:
        batch, width = key.batch, key.top_k
        self.key = key
        self._layer = layer
        self._work = Activations.make(
            layer.padded, batch * max(MAX_PAIRS, width), layer.weights.head.shape[0]
        )
        hidden = self._hidden_size = layer.padded.hidden_size
        self._pair_tokens = torch.zeros(batch * MAX_PAIRS, dtype=torch.int32)
        self._pair_features = torch.zeros(batch * MAX_PAIRS, hidden)
        self._regressed = [torch.zeros(batch * width, hidden) for _ in range(2)]
        self._block_table = torch.zeros(batch, key.table_width, dtype=torch.int32)
        counts = torch.zeros(4, batch, dtype=torch.int32)
        self._counts = counts.numpy()
        self._kv_len, self._kv_len_after, self._num_earlier = counts[0], counts[1], counts[2]
        self.num_pairs = counts[3]
        self._one = torch.ones(batch, dtype=torch.int32)
        self._zero = torch.zeros(batch, dtype=torch.int32)
        self._width = torch.full((batch,), width, dtype=torch.int32)
        levels = torch.arange(max_levels + 1, dtype=torch.int32) - 1  # what level l's rows stand on
        self._level_depth = levels[:, None, None].expand(-1, batch, width).contiguous()
        self._level_first = (levels * width)[:, None].expand(-1, batch).contiguous()
        depths = torch.arange(MAX_PAIRS - 1, dtype=torch.int32)
        self._earlier_depth = depths.expand(batch, -1).contiguous()
        path = torch.arange(MAX_PAIRS, dtype=torch.int32)
        self.pair_path = path.expand(batch, -1).contiguous()
        self._last_bits = torch.zeros(batch, 1, _WORDS, dtype=torch.int64)
        self._root_scores = torch.zeros(batch, 1)
        self._root_candidates = torch.full((batch, 1), -1, dtype=torch.int32)
        self._root_bits = torch.zeros(batch, 1, _WORDS, dtype=torch.int64)
        self._roots = torch.zeros(batch, dtype=torch.int32)
        self._coupling = Coupling.make(batch) if key.is_coupled else None
        self._frontiers = [Frontier.make(batch, width) for _ in range(2)]
        self._pool = Pool.make(batch, width + max_levels * width * width)
        num_parts = max(1, min(batch * width, torch.get_num_threads()))
        self._scratch = torch.empty(num_parts, expand_workspace_size(layer.weights.head.shape[0]))
        self._choices: dict[int, Choice] = {}

    # --- staging ------------------------------------------------------------------------------

    def stage(
        self,
        states: Sequence[SequenceState],
        batch: CacheBatch,
        pending: Sequence[torch.Tensor],
    ) -> int:
        """Copy in what a round starts from.

        Args:
            states: B sequences.
            batch: their draft caches; each holds the pairs before the pending ones.
            pending: features ``[m, H]``, 1 to :data:`MAX_PAIRS` of each sequence, not yet run.

        Returns:
            The largest m: rows of a sequence in the extending step.
        """
        most: int = max(len(features) for features in pending)
        size = self.key.batch
        tokens = self._pair_tokens[: size * most].numpy()
        earlier = tokens[size:].reshape(size, most - 1)
        rows = self._pair_features[size : size * most].view(size, most - 1, self._hidden_size)
        lengths = [cached.length for cached in batch.sequences]
        for row, (state, features) in enumerate(zip(states, pending, strict=True)):
            count, first = len(features), lengths[row] + 1
            tokens[row] = state.token_ids[first + count - 1]
            earlier[row, : count - 1] = state.token_ids[first : first + count - 1]
            self._pair_features[row] = features[-1]
            rows[row, : count - 1] = features[:-1]
            self._counts[:, row] = lengths[row], lengths[row] + count, count - 1, count
            self._last_bits[row, 0, 0] = (1 << count) - 1
            self._roots[row] = state.token_ids[-1]
        self._block_table.copy_(batch.block_table)
        if self._coupling is not None:
            self._coupling.stage(states)
        return most

    # --- steps: nothing but launches on static buffers ----------------------------------------

    def extend(self, most: int, batch: CacheBatch) -> None:
        """Run the staged pairs, and score the root's children.

        Rows lie with each sequence's last pair first, because that one alone goes on to attention,
        MLP and head; the earlier ones only leave keys and values.
        """
        size, cache, work = self.key.batch, batch.cache, self._work
        rows = size * most
        self._layer.sample_features(
            self._pair_tokens[:rows], None, self._pair_features[:rows], work
        )
        if most > 1:
            depth = self._earlier_depth[:, : most - 1]
            earlier = Rows(depth, self._kv_len, self._zero, self._num_earlier, self._block_table)
            self._layer.append(size, earlier, cache, work)
        last = Rows(
            self._num_earlier[:, None],
            self._kv_len,
            self._num_earlier,
            self._one,
            self._block_table,
        )
        q = self._layer.append(0, last, cache, work)
        logits = self._layer.finish(
            q, self._last_bits, last, cache, work, self._regressed[0][:size]
        )
        self._score(0, logits.view(size, 1, -1))

    def expand(self, level: int, batch: CacheBatch) -> None:
        """Run the frontier of level ``level - 1`` and score its children."""
        size, width = self.key.batch, self.key.top_k
        above, work = self._frontiers[(level - 1) % 2], self._work
        features = self._regressed[(level - 1) % 2]
        self._layer.sample_features(above.tokens.view(-1), above.source.view(-1), features, work)
        depth = self._level_depth[level]
        first = self._level_first[level]
        rows = Rows(depth, self._kv_len_after, first, self._width, self._block_table)
        q = self._layer.append(0, rows, batch.cache, work)
        regressed = self._regressed[level % 2]
        logits = self._layer.finish(q, above.ancestors, rows, batch.cache, work, regressed)
        self._score(level, logits.view(size, width, -1))

    def choose(self, num_levels: int, choice: Choice) -> None:
        """Fill ``choice`` with the best nodes of the levels scored so far."""
        width = self.key.top_k
        ops.tree_rerank(
            self._pool.tokens,
            self._pool.parents,
            self._pool.scores,
            width + (num_levels - 1) * width * width,
            self._roots,
            choice.draft_tokens,
            choice.parents,
            choice.num_nodes,
            choice.node_scores,
        )

    def _score(self, level: int, logits: torch.Tensor) -> None:
        """Children of the level's nodes from ``logits [B, F, R]``, and the next frontier."""
        if level == 0:
            scores, candidates, bits = self._root_scores, self._root_candidates, self._root_bits
        else:
            above = self._frontiers[(level - 1) % 2]
            scores, candidates, bits = above.scores, above.candidates, above.ancestors
        below = self._frontiers[level % 2]
        sampling, position = self._coupling or (None, None)
        ops.tree_expand(
            logits,
            scores,
            candidates,
            bits,
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
        )

    # --- what Python looks at between steps ---------------------------------------------------

    def choice(self, num_nodes: int) -> Choice:
        """Static buffers for a choice of ``num_nodes`` nodes."""
        known = self._choices.get(num_nodes)
        if known is None:
            known = self._choices[num_nodes] = Choice.make(self.key.batch, num_nodes)
        return known

    def scores(self, level: int) -> np.ndarray:
        """``[B, K]`` float32: scores of the frontier that ``level`` made, valid until level + 2."""
        scores: np.ndarray = self._frontiers[level % 2].scores.numpy()
        return scores
