"""Draft trees: what drafters build on the host, and what the engine makes of any proposal.

Small integer work on at most 128 nodes; drafters that build trees on the device use their own op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from specrt.types import DraftTree, Proposal

MAX_NODES = 128


def num_words(num_nodes: int) -> int:
    """W: 64-bit words an ancestor mask of ``num_nodes`` bits takes."""
    return (num_nodes + 63) // 64


class TreeBuilder:
    """Grows one sequence's tree node by node; shared prefixes of paths become shared nodes."""

    def __init__(self, root_token: int) -> None:
        self.tokens = [root_token]
        self.parents = [-1]
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
        return node

    def add_path(self, tokens: Sequence[int], max_nodes: int) -> int:
        """Add a path below the root, stopping where the tree would pass ``max_nodes`` nodes.

        Returns:
            How many of ``tokens`` are in the tree.
        """
        node = 0
        for count, token in enumerate(tokens):
            if len(self.tokens) >= max_nodes and (node, token) not in self._children:
                return count
            node = self.add(node, token)
        return len(tokens)


def stack(trees: Sequence[TreeBuilder]) -> Proposal:
    """One padded :class:`Proposal` of B sequences from one builder each."""
    batch, size = len(trees), max(len(tree) for tree in trees)
    ints = np.zeros((2, batch, size), dtype=np.int32)
    for row, tree in enumerate(trees):
        ints[0, row, : len(tree)] = tree.tokens
        ints[1, row, : len(tree)] = tree.parents
    fields = torch.from_numpy(ints)
    num_nodes = torch.tensor([len(tree) for tree in trees], dtype=torch.int32)
    return Proposal(fields[0], fields[1], num_nodes)


@lru_cache(maxsize=256)
def _chain_shape(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    parents = torch.arange(-1, length - 1, dtype=torch.int32).expand(batch, -1).contiguous()
    return parents, torch.full((batch,), length, dtype=torch.int32)


def chain(tokens: torch.Tensor) -> Proposal:
    """Trees without branches from ``tokens [B, M]`` int32; M = 1 is the empty drafter's tree.

    The shape's tensors are shared between calls: trees are read, never written.
    """
    return Proposal(tokens, *_chain_shape(*tokens.shape))


def settle(
    proposal: Proposal, roots: torch.Tensor, max_nodes: torch.Tensor, vocab_size: int
) -> DraftTree:
    """The trees that a proposal holds: the engine's root, then what of the nodes makes a tree.

    A tree ends before its first node that is none: its number is not below both ``num_nodes`` and
    ``max_nodes``, its parent does not come before it, or its token is not in the vocabulary. So
    depth, ancestors and bounds follow from what was checked, whatever a drafter proposes.

    Args:
        proposal: B trees of M nodes.
        roots: ``[B]`` int32, each sequence's last token.
        max_nodes: ``[B]`` int32, at least 1: the room each sequence has, its root included.
        vocab_size: V.

    Raises:
        ValueError: a tensor of the proposal has another shape or dtype; names it.
    """
    tokens, parents = proposal.draft_tokens.numpy(), proposal.parents.numpy()
    room = np.minimum(proposal.num_nodes.numpy(), max_nodes.numpy()).clip(1, tokens.shape[1])
    size = int(room.max())
    kept = np.zeros((3, len(tokens), size), dtype=np.int32)
    bits = np.zeros((len(tokens), size, num_words(size)), dtype=np.uint64)
    for row, count in enumerate(room):
        kept[:, row, 0] = roots[row], -1, 0
        bits[row, 0, 0] = 1
        for node in range(1, count):
            token, parent = tokens[row, node], parents[row, node]
            if not (0 <= parent < node and 0 <= token < vocab_size):
                room[row] = node
                break
            kept[:, row, node] = token, parent, kept[2, row, parent] + 1
            bits[row, node] = bits[row, parent]
            bits[row, node, node // 64] |= np.uint64(1 << node % 64)
    fields = torch.from_numpy(kept)
    return DraftTree(
        draft_tokens=fields[0],
        parents=fields[1],
        depth=fields[2],
        ancestors=torch.from_numpy(bits.view(np.int64)),
        num_nodes=torch.from_numpy(room.astype(np.int32)),
        draft_probs=_first(proposal.draft_probs, size),
        hidden=_first(proposal.hidden, size),
        num_layers_run=proposal.num_layers_run,
    )


def _first(rows: torch.Tensor | None, count: int) -> torch.Tensor | None:
    return None if rows is None else rows[:, :count].contiguous()


@lru_cache(maxsize=256)
def _chain_tree(batch: int, length: int) -> DraftTree:
    tokens = torch.zeros(batch, length, dtype=torch.int32)
    full = torch.full((batch,), length, dtype=torch.int32)
    return settle(chain(tokens), tokens[:, 0], full, 1)


def chain_tree(tokens: torch.Tensor) -> DraftTree:
    """Known tokens ``[B, N]`` int32 as trees without branches, to be run and not to be doubted."""
    return replace(_chain_tree(*tokens.shape), draft_tokens=tokens)
