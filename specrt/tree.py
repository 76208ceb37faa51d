"""Draft trees built on the host: a root, a chain, or any set of root-to-node paths.

Small integer work on at most 128 nodes; drafters that build trees on the device use their own op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from specrt.types import DraftTree

MAX_NODES = 128


def num_words(num_nodes: int) -> int:
    """W: 64-bit words an ancestor mask of ``num_nodes`` bits takes."""
    return (num_nodes + 63) // 64


class TreeBuilder:
    """Grows one sequence's tree node by node; shared prefixes of paths become shared nodes."""

    def __init__(self, root_token: int) -> None:
        self.tokens = [root_token]
        self.parents = [-1]
        self.depth = [0]
        self.ancestors = [1]
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int) -> int:
        """Return the child of ``parent`` with ``token``, made if it is not there yet."""
        node = self._children.get((parent, token))
        if node is not None:
            return node
        node = len(self.tokens)
        self._children[parent, token] = node
        self.tokens.append(token)
        self.parents.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.ancestors.append(self.ancestors[parent] | 1 << node)
        return node

    def add_path(self, tokens: Sequence[int], max_nodes: int) -> None:
        """Add a path below the root, stopping where the tree would pass ``max_nodes`` nodes."""
        node = 0
        for token in tokens:
            if len(self.tokens) >= max_nodes and (node, token) not in self._children:
                return
            node = self.add(node, token)


def stack(trees: Sequence[TreeBuilder]) -> DraftTree:
    """One padded :class:`DraftTree` of B sequences from one builder each."""
    batch, size = len(trees), max(len(tree) for tree in trees)
    words = num_words(size)
    ints = np.zeros((3, batch, size), dtype=np.int32)
    ancestors = np.zeros((batch, size, words), dtype=np.uint64)
    for row, tree in enumerate(trees):
        used = len(tree)
        ints[0, row, :used] = tree.tokens
        ints[1, row, :used] = tree.parents
        ints[2, row, :used] = tree.depth
        for word in range(words):
            ancestors[row, :used, word] = [
                (bits >> 64 * word) & 0xFFFFFFFFFFFFFFFF for bits in tree.ancestors
            ]
    fields = torch.from_numpy(ints)
    return DraftTree(
        draft_tokens=fields[0],
        parents=fields[1],
        depth=fields[2],
        ancestors=torch.from_numpy(ancestors.view(np.int64)),
        num_nodes=torch.tensor([len(tree) for tree in trees], dtype=torch.int32),
    )


def first_nodes(tree: DraftTree, count: int) -> DraftTree:
    """The first ``count`` nodes of each tree: trees again, for parents come before children."""

    def cut(part: torch.Tensor) -> torch.Tensor:
        return part[:, :count].contiguous()

    return replace(
        tree,
        draft_tokens=cut(tree.draft_tokens),
        parents=cut(tree.parents),
        depth=cut(tree.depth),
        ancestors=tree.ancestors[:, :count, : num_words(count)].contiguous(),
        num_nodes=tree.num_nodes.clamp(max=count),
        draft_probs=None if tree.draft_probs is None else cut(tree.draft_probs),
        hidden=None if tree.hidden is None else cut(tree.hidden),
    )


@lru_cache(maxsize=256)
def _chain_shape(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    builder = TreeBuilder(0)
    builder.add_path(range(1, length), length)
    tree = stack([builder] * batch)
    return tree.parents, tree.depth, tree.ancestors, tree.num_nodes


def chain(tokens: torch.Tensor) -> DraftTree:
    """Trees without branches from ``tokens [B, N]`` int32; N = 1 is the empty drafter's tree.

    The shape's tensors are shared between calls: trees are read, never written.
    """
    parents, depth, ancestors, num_nodes = _chain_shape(*tokens.shape)
    return DraftTree(tokens, parents, depth, ancestors, num_nodes)
