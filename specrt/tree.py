"""Draft trees: what drafters build on the host, and what the engine makes of any proposal.

Small integer work on at most 128 nodes; drafters that build trees on the device use their own op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from specrt import ops
from specrt.device import CPU, Device
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
    """Trees without branches from ``tokens [B, M]`` int32 on the host; M = 1 is the root alone.

    A root alone shares its shape with other calls: it is one whatever is written there.
    """
    parents, num_nodes = _chain_shape(*tokens.shape)
    if tokens.shape[1] > 1:  # others are the caller's to write to
        parents, num_nodes = parents.clone(), num_nodes.clone()
    return Proposal(tokens, parents, num_nodes)


def check_proposal(proposal: Proposal, batch: int, device: Device) -> None:
    """Whether the tensors of a proposal can be read at all; what they say is another matter.

    Args:
        proposal: what a drafter gave.
        batch: B, how many sequences it was asked for.
        device: where its tensors may lie, all of them there or all on the host.

    Raises:
        TypeError: it is no proposal.
        ValueError: a tensor has another shape, dtype or place; names it.
    """
    if not isinstance(proposal, Proposal):
        raise TypeError(f"propose: expected a Proposal, got {type(proposal).__name__}")
    tokens, probs = proposal.draft_tokens, proposal.draft_probs
    _check_field("draft_tokens", tokens, torch.int32, (batch, None))
    size = tokens.shape[1]
    _check_field("parents", proposal.parents, torch.int32, (batch, size))
    _check_field("num_nodes", proposal.num_nodes, torch.int32, (batch,))
    if probs is not None:
        _check_field("draft_probs", probs, torch.float32, (batch, size, None))
    _check_place(proposal, device)


def _check_place(proposal: Proposal, device: Device) -> None:
    is_there = device.holds(proposal.draft_tokens)
    where = f"{device}, where draft_tokens is" if is_there else "the CPU"
    for name in ("draft_tokens", "parents", "num_nodes", "draft_probs"):
        tensor = getattr(proposal, name)
        if tensor is None or (
            device.holds(tensor) == is_there and (is_there or tensor.device == CPU)
        ):
            continue
        got = device if device.holds(tensor) else tensor.device
        raise ValueError(f"{name}: expected a tensor on {where}, got one on {got}")


def _check_field(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
) -> None:
    if (
        isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and tensor.dtype is dtype
        and tensor.ndim == len(shape)
        and all(
            want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
        )
        and tensor.numel() > 0
    ):
        return
    expected = ", ".join("n" if size is None else str(size) for size in shape)
    got = type(tensor).__name__
    if isinstance(tensor, torch.Tensor):
        got = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.layout is not torch.strided:
            got = f"{got}, {tensor.layout}"
    kind = str(dtype).removeprefix("torch.")
    raise ValueError(f"{name}: expected [{expected}] {kind}, got {got}")


class Settler:
    """Makes trees of proposals, in buffers of its own: a tree is valid until the next one.

    A tree ends before its first node that is none: its number is not below both ``num_nodes`` and
    the room there is, its parent does not come before it, or its token is not in the vocabulary.
    So depth, ancestors and bounds follow from what was checked, whatever a drafter proposes.

    Args:
        vocab_size: V.
        device: where its trees lie; None: the CPU.
    """

    def __init__(self, vocab_size: int, device: Device | None = None) -> None:
        self._vocab_size = vocab_size
        self._device = device or Device()
        self._trees: dict[tuple[int, int], DraftTree] = {}
        self._roots_alone: dict[int, Proposal] = {}

    def settle(
        self, proposal: Proposal, roots: torch.Tensor, max_nodes: torch.Tensor, size: int
    ) -> DraftTree:
        """The trees that a proposal holds.

        Args:
            proposal: B trees of M nodes (:func:`check_proposal`).
            roots: ``[B]`` int32, each sequence's last token.
            max_nodes: ``[B]`` int32, at least 1: the room each sequence has, its root included.
            size: that trees have nodes for, 1 to :data:`MAX_NODES`.
        """
        batch = proposal.draft_tokens.shape[0]
        size = min(size, proposal.draft_tokens.shape[1])
        if not self._device.holds(proposal.draft_tokens):
            proposal = self._uploaded(proposal)
        tree = self._trees.get((batch, size))
        if tree is None:
            tree = self._trees[batch, size] = empty_tree(batch, size, self._device)
        launch_settle(proposal, roots, max_nodes, self._vocab_size, tree)
        if proposal.draft_probs is None:
            return tree
        return replace(tree, draft_probs=proposal.draft_probs[:, :size].contiguous())

    def _uploaded(self, proposal: Proposal) -> Proposal:
        """A host's proposal on the device, in one copy; roots alone say nothing, and need none."""
        batch, size = proposal.draft_tokens.shape
        if size == 1:
            alone = self._roots_alone.get(batch)
            if alone is None:
                tokens, parents = self._device.zeros(2, batch, 1, dtype=torch.int32)
                ones = self._device.zeros(batch, dtype=torch.int32).fill_(1)
                alone = self._roots_alone[batch] = Proposal(tokens, parents, ones)
            return alone
        there = self._device.there
        flat = [proposal.draft_tokens.ravel(), proposal.parents.ravel(), proposal.num_nodes]
        sizes = [part.numel() for part in flat]
        tokens, parents, num_nodes = there(torch.cat(flat)).split(sizes)
        probs = proposal.draft_probs
        return Proposal(
            tokens.view(batch, size),
            parents.view(batch, size),
            num_nodes,
            None if probs is None else there(probs),
        )


def launch_settle(
    proposal: Proposal,
    roots: torch.Tensor,
    max_nodes: torch.Tensor,
    vocab_size: int,
    out: DraftTree,
) -> None:
    """What :meth:`Settler.settle` launches: ``out`` (:func:`empty_tree`) becomes the trees that a
    proposal on its device holds."""
    ops.tree_settle(
        proposal.draft_tokens.contiguous(),
        proposal.parents.contiguous(),
        proposal.num_nodes.contiguous(),
        roots,
        max_nodes,
        vocab_size,
        out.draft_tokens,
        out.parents,
        out.depth,
        out.ancestors,
        out.num_nodes,
    )


def empty_tree(batch: int, size: int, device: Device) -> DraftTree:
    """Trees of ``size`` nodes on a device, to be written."""
    ints = device.zeros(3, batch, size, dtype=torch.int32)
    bits = device.zeros(batch, size, num_words(size), dtype=torch.int64)
    return DraftTree(ints[0], ints[1], ints[2], bits, device.zeros(batch, dtype=torch.int32))


def settle(
    proposal: Proposal, roots: torch.Tensor, max_nodes: torch.Tensor, vocab_size: int
) -> DraftTree:
    """:class:`Settler` for once, on the CPU and in fresh buffers; arguments as there."""
    size = int(torch.minimum(proposal.num_nodes, max_nodes).clamp(1, MAX_NODES).max())
    return Settler(vocab_size).settle(proposal, roots.contiguous(), max_nodes, size)


@lru_cache(maxsize=256)
def _chain_tree(batch: int, length: int) -> DraftTree:
    tokens = torch.zeros(batch, length, dtype=torch.int32)
    full = torch.full((batch,), length, dtype=torch.int32)
    return settle(chain(tokens), torch.zeros(batch, dtype=torch.int32), full, 1)


def chain_tree(tokens: torch.Tensor) -> DraftTree:
    """Known tokens ``[B, N]`` int32 on the CPU as trees without branches, to be run and not to be
    doubted."""
    return replace(_chain_tree(*tokens.shape), draft_tokens=tokens)


class ChainTrees:
    """:func:`chain_tree` on a device.

    Args:
        device: where tokens and trees lie.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._shapes: dict[torch.Size, DraftTree] = {}

    def of(self, tokens: torch.Tensor) -> DraftTree:
        """Known tokens ``[B, N]`` int32 as trees without branches."""
        if not self._device.is_gpu:
            return chain_tree(tokens)
        shape = self._shapes.get(tokens.shape)
        if shape is None:
            there, one = self._device.there, _chain_tree(*tokens.shape)
            shape = self._shapes[tokens.shape] = DraftTree(
                tokens, there(one.parents), there(one.depth), there(one.ancestors),
                there(one.num_nodes),
            )  # fmt: skip
        return replace(shape, draft_tokens=tokens)
