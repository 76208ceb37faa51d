"""The trees over which a drafter runs a target's first layers: what was staged, what was run of it.

B sequences, F nodes of a level (1 at level 0, the root's; then ``width``), N nodes of a tree. Where
rows stand and what they see follows here from tokens and parents. Two keep these books the same
way, and differ in how they tell that a tree is the one that was run. The host compares. A GPU's
tensors cannot be compared without waiting for them: there only a tree is taken that is settled from
the very memory which the layers read.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from specrt.device import Device
from specrt.tree import MAX_NODES, num_words
from specrt.types import DraftTree, Proposal

Ints = npt.NDArray[np.int32] | torch.Tensor
"""int32: on the host through numpy, where small reads and writes cost a tenth of torch's."""


class RunShape(NamedTuple):
    """What a run's buffers are sized for."""

    batch: int
    """B"""
    table_width: int
    """Of the target's page table."""
    width: int
    """Nodes of each level below the root; 1 is a chain."""
    num_levels: int
    """Below the root, at most."""
    num_layers: int
    """N"""

    @property
    def num_nodes(self) -> int:
        """Of one tree, its root included."""
        return 1 + self.num_levels * self.width

    def check(self) -> None:
        """Whether there are such trees.

        Raises:
            ValueError: they are larger.
        """
        if self.num_nodes > MAX_NODES:
            raise ValueError(f"num_levels, width: expected at most {MAX_NODES} nodes, got {self}")

    def place(self, level: int) -> slice:
        """A level's nodes."""
        first = 1 + (level - 1) * self.width
        return slice(first, first + self.width) if level else slice(0, 1)

    def rows(self, level: int) -> slice:
        """A level's rows where rows stand level after level."""
        nodes = self.place(level)
        return slice(self.batch * nodes.start, self.batch * nodes.stop)

    def last_level(self, num_nodes: int) -> int:
        """That of the last of the first so many nodes."""
        return -(-(num_nodes - 1) // self.width)

    def order(self) -> npt.NDArray[np.int64]:
        """``[B, N]``: the rows of trees' nodes where rows stand level after level."""
        every = np.arange(self.batch * self.num_nodes)
        levels = [every[self.rows(level)] for level in range(1 + self.num_levels)]
        return np.concatenate([rows.reshape(self.batch, -1) for rows in levels], axis=1)


class RunTrees(Protocol):
    """Trees of one :class:`RunShape`, in static buffers."""

    depth: torch.Tensor
    """``[B, N]`` int32"""
    ancestors: torch.Tensor
    """``[B, N, W]`` int64 bits"""
    roots: torch.Tensor
    """``[B]`` int32, to be written before :meth:`begin`."""

    def begin(self) -> None:
        """New trees; the roots are staged."""

    def stage(self, level: int, tokens: Ints, parents: Ints | None) -> None:
        """Take a level below the root: ``[B, F]`` each; of a chain parents are not asked.

        Raises:
            ValueError: parents that are none, or tensors of another shape.
        """

    def ids(self, level: int) -> torch.Tensor:
        """``[B * F]`` int32: the level's tokens, to be looked up."""

    def tell_launched(self, level: int) -> None:
        """A level's layers were launched."""

    def is_run(self, level: int) -> bool:
        """Whether a staged level was launched since."""

    def staged(self, num_nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, num_nodes]`` int32: the first nodes' tokens and parents, to be proposed."""

    def are(self, tree: DraftTree, proposal: Proposal | None) -> bool:
        """Whether ``tree``, settled of ``proposal``, is what was staged, node by node."""


def make_trees(
    shape: RunShape, hidden: torch.Tensor, vocab_size: int, device: Device
) -> HostTrees | DeviceTrees:
    """Those for a device.

    Args:
        shape: sizes.
        hidden: ``[B * N, H]``: the states that the layers write, level after level.
        vocab_size: V.
        device: where they are.
    """
    return DeviceTrees(shape, vocab_size, device) if device.is_gpu else HostTrees(shape, hidden)


class HostTrees:
    """:class:`RunTrees` on the host.

    Launches come from graphs there, and so do not tell: states are NaN until they are run.

    Args:
        shape: sizes.
        hidden: as of :func:`make_trees`.
    """

    def __init__(self, shape: RunShape, hidden: torch.Tensor) -> None:
        batch, num_nodes = shape.batch, shape.num_nodes
        self._shape = shape
        self.depth = torch.zeros(batch, num_nodes, dtype=torch.int32)
        self.ancestors = torch.zeros(batch, num_nodes, num_words(num_nodes), dtype=torch.int64)
        tokens, parents = torch.zeros(2, batch * num_nodes, dtype=torch.int32)
        levels = [shape.rows(level) for level in range(1 + shape.num_levels)]
        self._ids: list[torch.Tensor] = [tokens[rows] for rows in levels]
        self.roots = self._ids[0]
        # The same memory through numpy.
        self._tokens, self._parents, self._marks = tokens.numpy(), parents.numpy(), hidden.numpy()
        self._tokens_at = [self._tokens[rows].reshape(batch, -1) for rows in levels]
        self._parents_at = [self._parents[rows].reshape(batch, -1) for rows in levels]
        self._marked = [rows.start for rows in levels]
        self._marks = self._marks[:, 0]
        self._depth, self._bits = self.depth.numpy(), self.ancestors.numpy().view(np.uint64)
        self._own_bits = _own_bits(num_nodes)
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self._write_static()

    def begin(self) -> None:
        self._marks[0] = math.nan

    def stage(self, level: int, tokens: Ints, parents: Ints | None) -> None:
        self._tokens_at[level][:] = tokens
        if self._shape.width > 1:
            self._see(level, parents)
        self._marks[self._marked[level]] = math.nan

    def ids(self, level: int) -> torch.Tensor:
        return self._ids[level]

    def tell_launched(self, level: int) -> None:
        pass

    def is_run(self, level: int) -> bool:
        """States that are NaN count as not run."""
        return not math.isnan(self._marks[self._marked[level]])

    def staged(self, num_nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies."""
        tokens, parents = self._first(num_nodes)
        return torch.from_numpy(tokens), torch.from_numpy(parents)

    def are(self, tree: DraftTree, proposal: Proposal | None) -> bool:
        num_nodes = tree.draft_tokens.shape[1]
        tokens, parents = self._first(num_nodes)
        theirs = tree.draft_tokens.numpy(), tree.parents.numpy()
        if tokens.tobytes() == theirs[0].tobytes() and parents.tobytes() == theirs[1].tobytes():
            return True
        is_padding = np.arange(num_nodes) >= tree.num_nodes.numpy()[:, None]
        is_same = (tokens == theirs[0]) & (parents == theirs[1])
        return bool((is_same | is_padding).all())

    def _write_static(self) -> None:
        """What no round changes: the root's, and all of a chain's, where a row has one parent."""
        self._parents_at[0][:] = -1
        self._bits[:, 0] = self._own_bits[0]
        if self._shape.width == 1:
            for level in range(1, 1 + self._shape.num_levels):
                self._see(level, np.full((self._shape.batch, 1), level - 1, dtype=np.int32))

    def _see(self, level: int, parents: Ints | None) -> None:
        """Derive depth and ancestors of a level's nodes."""
        here, sequence = self._shape.place(level), np.arange(self._shape.batch)[:, None]
        if parents is None or parents.min() < 0 or parents.max() >= here.start:
            raise _no_parents(here.start, parents)
        self._parents_at[level][:] = parents
        self._depth[:, here] = self._depth[sequence, parents] + 1
        self._bits[:, here] = self._bits[sequence, parents] | self._own_bits[here]

    def _first(self, num_nodes: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Copies ``[B, num_nodes]`` of the first nodes' tokens and parents, tree by tree."""
        if self._shape.batch == 1:
            return self._tokens[None, :num_nodes].copy(), self._parents[None, :num_nodes].copy()
        order = self._orders.get(num_nodes)
        if order is None:
            order = self._orders[num_nodes] = self._shape.order()[:, :num_nodes].copy()
        return self._tokens[order], self._parents[order]


class DeviceTrees:
    """:class:`RunTrees` on a GPU, of which the host reads nothing.

    Whatever a drafter stages becomes a tree: tokens are clamped to the vocabulary, parents to the
    levels above. A tree is what was staged if it was settled from these buffers and only this class
    has written there. torch counts the writes to a tensor; what it does not see, a kernel's or
    another stream's, is past checking.

    Args:
        shape: sizes.
        vocab_size: V.
        device: where to.
    """

    def __init__(self, shape: RunShape, vocab_size: int, device: Device) -> None:
        self._shape, self._last_token, self._device = shape, vocab_size - 1, device
        batch, num_nodes = shape.batch, shape.num_nodes
        with torch.inference_mode(False):  # whose tensors' writes are not counted
            self._tokens, self._parents, self.depth = (
                device.zeros(batch, num_nodes, dtype=torch.int32) for _ in range(3)
            )
            self.ancestors = device.zeros(batch, num_nodes, num_words(num_nodes), dtype=torch.int64)
        self.roots = self._tokens[:, 0]
        self._own_bits = device.there(torch.from_numpy(_own_bits(num_nodes).view(np.int64)))
        self._is_run = [False] * (1 + shape.num_levels)
        self._num_writes: tuple[int, ...] = ()
        self._is_own = False

    def begin(self) -> None:
        # (The roots were written just now.)
        if not self._is_own or self._num_writes[1:] != self._count_writes()[1:]:
            self._write_static()
        self._is_run[0], self._is_own = False, True
        self._num_writes = self._count_writes()

    def stage(self, level: int, tokens: Ints, parents: Ints | None) -> None:
        self._is_own = self._are_only_mine()
        self._is_run[level] = False
        here = self._shape.place(level)
        self._tokens[:, here] = self._there("tokens", tokens, level).clamp(0, self._last_token)
        if self._shape.width > 1:
            if parents is None:
                raise _no_parents(here.start, parents)
            self._see(here, self._there("parents", parents, level).clamp(0, here.start - 1))
        self._num_writes = self._count_writes()

    def ids(self, level: int) -> torch.Tensor:
        return self._tokens[:, self._shape.place(level)].reshape(-1).contiguous()

    def tell_launched(self, level: int) -> None:
        self._is_run[level] = True

    def is_run(self, level: int) -> bool:
        """A launch that nobody told of counts as none."""
        return self._is_run[level]

    def staged(self, num_nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of these buffers."""
        return self._tokens[:, :num_nodes], self._parents[:, :num_nodes]

    def are(self, tree: DraftTree, proposal: Proposal | None) -> bool:
        if proposal is None or not self._are_only_mine():
            return False
        size = proposal.draft_tokens.shape[1]
        if not tree.draft_tokens.shape[1] <= size <= self._shape.num_nodes:
            return False
        tokens, parents = self.staged(size)
        return _is_same(proposal.draft_tokens, tokens) and _is_same(proposal.parents, parents)

    def _write_static(self) -> None:
        """What no round changes: the root's, and all of a chain's."""
        num_static = self._shape.num_nodes if self._shape.width == 1 else 1
        rows = np.arange(num_static, dtype=np.int32)
        bits = np.bitwise_or.accumulate(_own_bits(self._shape.num_nodes)[:num_static], axis=0)
        for table, values in (
            (self._parents, rows - 1),
            (self.depth, rows),
            (self.ancestors, bits.view(np.int64)),
        ):
            there = self._device.there(torch.from_numpy(values))
            table[:, :num_static] = there  # of each sequence

    def _see(self, here: slice, parents: torch.Tensor) -> None:
        """Derive depth and ancestors of a level's nodes."""
        index = parents.long()
        wide = index[:, :, None].expand(-1, -1, self.ancestors.shape[2])
        self._parents[:, here] = parents
        self.depth[:, here] = self.depth.gather(1, index) + 1
        self.ancestors[:, here] = self.ancestors.gather(1, wide) | self._own_bits[here]

    def _there(self, name: str, given: Ints, level: int) -> torch.Tensor:
        """What a drafter gave for a level."""
        tensor = self._device.there(torch.as_tensor(given))
        shape = self._shape.batch, self._shape.width
        if tensor.shape != shape or tensor.is_floating_point():
            raise ValueError(
                f"{name}: expected {list(shape)} int32 for level {level}, "
                f"got {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            )
        return tensor

    def _count_writes(self) -> tuple[int, ...]:
        # Views share a count: these, and what is handed out of them.
        written = self._tokens, self._parents, self.depth, self.ancestors
        return tuple(tensor._version for tensor in written)

    def _are_only_mine(self) -> bool:
        return self._is_own and self._num_writes == self._count_writes()


def _own_bits(num_nodes: int) -> npt.NDArray[np.uint64]:
    """``[N, W]``: each node's own bit."""
    bits = np.zeros((num_nodes, num_words(num_nodes)), dtype=np.uint64)
    nodes = np.arange(num_nodes, dtype=np.uint64)
    bits[nodes, nodes // 64] = np.uint64(1) << nodes % 64
    return bits


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two int32 tensors are the same memory, element by element."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def _no_parents(first: int, parents: Ints | None) -> ValueError:
    return ValueError(f"parents: expected nodes 0..{first - 1}, got {parents}")
