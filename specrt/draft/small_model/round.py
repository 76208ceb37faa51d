"""A round of a small model as launches alone: catch up with the histories, then grow trees.

The draft cache holds the token of position i in slot i, so its committed length is the history's,
and there is nothing to commit. What was accepted last, whose number the host does not know yet, is
among the last W tokens of a history; all of these are run, those that were run before to the same
bits. So the root is always the last row, and its logits need no gather.

Shapes: B sequences, W tokens, L levels of K nodes, S token ids that both models have. Draft node
l * K + j is node j of the frontier that level l made; level l >= 1 is run from the frontier of
level l - 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from specrt import ops
from specrt.cache import CacheBatch
from specrt.device import Device
from specrt.draft.base import BatchTables
from specrt.draft.coupling import expand_scratch
from specrt.draft.fspad.round import Choice, Frontier, Pool
from specrt.models.model import LlamaModel
from specrt.models.step import StepRows
from specrt.tree import ChainTrees
from specrt.types import Proposal


class TreeKey(NamedTuple):
    """What a round's buffers are sized for, and where the draft cache lies."""

    batch: int
    num_tail: int
    """W"""
    num_levels: int
    """L"""
    top_k: int
    """K"""
    is_coupled: bool
    version: int
    """Of the device's steps."""
    table_address: int
    table_width: int

    @property
    def num_nodes(self) -> int:
        """Of a tree, its root included."""
        return 1 + self.num_levels * self.top_k


class _Places(NamedTuple):
    """What is known beforehand of where a pass's rows stand."""

    depth: torch.Tensor
    first_node: torch.Tensor
    num_nodes: torch.Tensor


class TreeRound:
    """The buffers of rounds of one :class:`TreeKey`, and the launches over them.

    Args:
        key: sizes.
        model: the small one, which has reserved its own buffers for this.
        cached: pages of its cache; lengths there are not looked at.
        num_shared: S.
    """

    def __init__(
        self, key: TreeKey, model: LlamaModel, cached: CacheBatch, num_shared: int
    ) -> None:
        self.key = key
        self._model, self._cache, self._num_shared = model, cached.cache, num_shared
        self._table = cached.block_table
        device, (batch, tail, levels, top_k) = model.device, key[:4]
        rows, config = max(tail, top_k), model.config
        self._hidden = device.empty(batch * rows, config.hidden_size, dtype=model.activation_dtype)
        self._feature = torch.empty_like(self._hidden[: batch * top_k])
        self._logits = device.empty(batch * top_k, config.vocab_size)
        self._tail = device.zeros(batch, tail, dtype=torch.int32)
        self._start, no_first = device.zeros(2, batch, dtype=torch.int32)
        chain = ChainTrees(device).of(self._tail)
        self._chain_bits = chain.ancestors
        self._chain = _Places(chain.depth, no_first, chain.num_nodes)
        self._levels = _levels(key, device)
        self._root = Frontier.root(batch, device)
        self._frontiers = [Frontier.make(batch, top_k, device) for _ in range(2)]
        self._pool = Pool.make(batch, top_k + (levels - 1) * top_k**2, device)
        self._scratch = expand_scratch(batch, top_k, num_shared, top_k, device)
        self._choice = Choice.make(batch, key.num_nodes, device)

    def launch(self, tables: BatchTables) -> Proposal:
        """Trees of all sequences, of the nodes of the highest probability; nothing but launches."""
        key, pool, choice = self.key, self._pool, self._choice
        ops.history_tail(tables.history, tables.history_len, self._tail, self._start)
        hidden = self._run(self._tail, self._chain, self._start, self._chain_bits)
        self._score(0, hidden.view(key.batch, key.num_tail, -1)[:, -1], tables)
        for level, places in enumerate(self._levels, 1):
            above = self._frontiers[(level - 1) % 2]
            hidden = self._run(above.tokens, places, tables.history_len, above.ancestors)
            self._score(level, hidden, tables)
        ops.tree_rerank(
            pool.tokens,
            pool.parents,
            pool.scores,
            pool.tokens.shape[1],
            tables.roots,
            choice.draft_tokens,
            choice.parents,
            choice.num_nodes,
            choice.node_scores,
        )
        return Proposal(choice.draft_tokens, choice.parents, choice.num_nodes)

    def _run(
        self,
        tokens: torch.Tensor,
        places: _Places,
        kv_len: torch.Tensor,
        ancestors: torch.Tensor,
    ) -> torch.Tensor:
        """The model's layers over ``tokens [B, N]``: hidden states ``[B * N, H]``."""
        model, hidden = self._model, self._hidden[: tokens.numel()]
        depth, first_node, num_nodes = places
        rows = StepRows(depth, ancestors, num_nodes, first_node, kv_len, self._table)
        model.embed_tokens(tokens.view(-1), rows, hidden)
        for index in range(model.config.num_layers):
            model.launch_layer(index, hidden, rows, self._cache, hidden)
        return hidden

    def _score(self, level: int, hidden: torch.Tensor, tables: BatchTables) -> None:
        """Children of the level's nodes from ``hidden [B * F, H]``, and the next frontier."""
        count = len(hidden)
        logits = self._logits[:count]
        self._model.launch_head(hidden, self._feature[:count], logits)
        above = self._root if level == 0 else self._frontiers[(level - 1) % 2]
        below = self._frontiers[level % 2]
        is_coupled = self.key.is_coupled
        ops.tree_expand(
            logits.view(self.key.batch, -1, logits.shape[1])[..., : self._num_shared],
            above.scores,
            above.candidates,
            above.ancestors,
            None,
            tables.sampling.rows if is_coupled else None,
            tables.history_len if is_coupled else None,
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


def _levels(key: TreeKey, device: Device) -> list[_Places]:
    """Of the rows below each level but the last; a child of the root stands at the history's
    length."""
    sizes = 1, key.batch, key.top_k
    levels = torch.arange(key.num_levels - 1, dtype=torch.int32)
    depth = device.there(levels[:, None, None].repeat(sizes))
    first_node = device.there((levels * key.top_k)[:, None].repeat(sizes[:2]))
    num_nodes = device.there(torch.full_like(levels, key.top_k)[:, None].repeat(sizes[:2]))
    return [_Places(*parts) for parts in zip(depth, first_node, num_nodes, strict=True)]
