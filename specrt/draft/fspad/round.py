"""One drafting round of a batch: static buffers, and the steps that a graph can run again.

B sequences, K = top_k, R rows of the draft head, W = 2 words of ancestor bits, C pool entries.
Level 0 is the root's children; level l is run from the frontier of level l - 1. Draft node l*K + j
(what ancestor bits and cache rows count) is node j of the frontier of level l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from specrt import ops
from specrt.cache import CacheBatch
from specrt.device import Device
from specrt.draft.coupling import ROW_WORDS, Coupling, expand_scratch, write_sampling
from specrt.draft.fspad.layer import DraftLayer, Rows
from specrt.draft.staging import Staging
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
    def make(cls, batch: int, width: int, device: Device) -> Frontier:
        """Empty buffers."""
        tokens, candidates, source = device.zeros(3, batch, width, dtype=torch.int32)
        bits = device.zeros(batch, width, _WORDS, dtype=torch.int64)
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


class RoundBuffers:
    """The buffers of rounds of one :class:`RoundKey` and the steps over them.

    ``pair_path [B, MAX_PAIRS]`` and ``num_pairs [B]``, both int32, commit the staged pairs.

    Args:
        key: sizes.
        layer: the drafter's layer, on whose device they are.
        max_levels: beyond the root's children.
    """

    def __init__(self, key: RoundKey, layer: DraftLayer, max_levels: int) -> None:
        batch, width, device = key.batch, key.top_k, layer.device
        self.key = key
        self._layer, self._device = layer, device
        self._work = layer.activations(batch * max(MAX_PAIRS, width), batch * width)
        hidden, dtype = layer.padded.hidden_size, layer.activation_dtype
        self._pair_features = device.zeros(batch * MAX_PAIRS, hidden, dtype=dtype)
        self._regressed = [device.zeros(batch * width, hidden, dtype=dtype) for _ in range(2)]
        self._block_table = device.zeros(batch, key.table_width, dtype=torch.int32)
        self._stage_inputs(key)
        self._zero, self._one, self._width = device.there(
            torch.tensor([[0], [1], [width]], dtype=torch.int32).repeat(1, batch)
        )
        levels = torch.arange(max_levels + 1, dtype=torch.int32) - 1  # what level l's rows stand on
        self._level_depth = device.there(levels[:, None, None].repeat(1, batch, width))
        self._level_first = device.there((levels * width)[:, None].repeat(1, batch))
        self.pair_path = device.there(torch.arange(MAX_PAIRS, dtype=torch.int32).repeat(batch, 1))
        self._root = Frontier.root(batch, device)
        self._frontiers = [Frontier.make(batch, width, device) for _ in range(2)]
        self._pool = Pool.make(batch, width + max_levels * width * width, device)
        self._scratch = expand_scratch(batch, width, len(layer.weights.head), width, device)
        self._choices: dict[int, Choice] = {}

    def _stage_inputs(self, key: RoundKey) -> None:
        batch, ints = key.batch, torch.int32
        self._staging = Staging(
            self._device,
            {
                "bits": ((batch, 1, _WORDS), torch.int64),
                "sampling": ((batch, ROW_WORDS), torch.int64),
                "position": ((batch,), ints),
                "counts": ((4, batch), ints),
                "roots": ((batch,), ints),
                "tokens": ((batch * MAX_PAIRS,), ints),
            },
        )
        there = self._staging.there
        self._pair_tokens, self._roots, self._last_bits = (
            there[name] for name in ("tokens", "roots", "bits")
        )
        self._kv_len, self._kv_len_after, self._num_earlier, self.num_pairs = there["counts"]
        self._coupling = None
        if key.is_coupled:
            self._coupling = Coupling(there["sampling"], there["position"])

    # --- staging ------------------------------------------------------------------------------

    def stage(
        self,
        states: Sequence[SequenceState],
        batch: CacheBatch,
        pending: Sequence[torch.Tensor],
    ) -> int:
        """Copy in what a round starts from: what the host knows in one piece, and the features.

        Args:
            states: B sequences.
            batch: their draft caches; each holds the pairs before the pending ones.
            pending: features ``[m, H]``, 1 to :data:`MAX_PAIRS` of each sequence, not yet run.

        Returns:
            The largest m: rows of a sequence in the extending step.
        """
        host, size = self._staging.host, self.key.batch
        counts = [len(features) for features in pending]
        most = max(counts)
        tokens = host["tokens"][: size * most]
        earlier = tokens[size:].reshape(size, most - 1)
        for row, (state, cached) in enumerate(zip(states, batch.sequences, strict=True)):
            length, count = cached.length, counts[row]
            *above, last = state.token_ids[length + 1 : length + 1 + count]
            tokens[row], earlier[row, : count - 1] = last, above
            host["counts"][:, row] = length, length + count, count - 1, count
            host["bits"][row, 0, 0] = (1 << count) - 1
            host["roots"][row] = state.token_ids[-1]
        if self._coupling is not None:
            write_sampling(states, host["sampling"], host["position"])
        self._staging.send()
        self._take_features(pending, most)
        self._block_table.copy_(batch.block_table)
        return most

    def _take_features(self, pending: Sequence[torch.Tensor], most: int) -> None:
        """Where :meth:`extend` wants them, each sequence's last one first. (What is left of rows
        that none has stays as it is, for nobody sees them.)"""
        size, places, features = self.key.batch, [], []
        hidden = self._pair_features.shape[1]
        rows = self._pair_features[size : size * most].view(size, most - 1, hidden)
        for row, some in enumerate(pending):
            places.append(self._pair_features[row])
            features.append(some[-1])
            if len(some) > 1:
                places.append(rows[row, : len(some) - 1])
                features.append(some[:-1])
        torch._foreach_copy_(places, features)

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
            depth = self.pair_path[:, : most - 1]
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
        above = self._root if level == 0 else self._frontiers[(level - 1) % 2]
        below = self._frontiers[level % 2]
        sampling, position = self._coupling or (None, None)
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
