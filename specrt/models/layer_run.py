"""The first N layers of a target, run by a drafter over a tree of its own.

Such a drafter says which tokens and parents a tree's next level has. Where rows stand and what they
see follows from that here, and here the states stay. Verification takes a tree up behind those
layers if it is the very tree that was run, for the very sequences; else it runs all layers. By row
invariance the bits are the same, so a drafter may be as wrong as it likes.

B sequences, F nodes of a level (1 at level 0, the root's; then ``width``), H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple
from weakref import ReferenceType, ref

import numpy as np
import numpy.typing as npt
import torch

from specrt.cache import SCRATCH_PAGE, CacheBatch, CachedSequence, KVCache
from specrt.models.step import StepRows, layer_tap
from specrt.tree import MAX_NODES, num_words
from specrt.types import DraftTree

if TYPE_CHECKING:
    from specrt.models.model import LlamaModel

_Ints = npt.NDArray[np.int32]


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


class RunLevel(NamedTuple):
    """A level, to be read: where its rows stand in the target's cache, and what came of them."""

    rows: StepRows
    hidden: torch.Tensor
    """``[B * F, H]`` float32: what the first N layers give, once launched."""


class _Inputs(NamedTuple):
    """A level's own part of what the first layer reads."""

    tokens: _Ints
    """``[B, F]``"""
    parents: _Ints
    ids: torch.Tensor
    """``[B * F]`` int32, the same memory as ``tokens``."""
    embedded: torch.Tensor
    """``[B * F, H]``"""
    first_row: int
    """Of all levels' rows, which stand level after level."""


class LayerRun:
    """Static buffers for the first N layers over growing trees, and the launches over them.

    What a drafter does for each level: :meth:`stage`, then :meth:`launch`, or the launch of a graph
    that captured it. Rows of the target's cache are written past ``kv_len``, each at its node's
    place. A run is for one cache, the first that it is begun for: a graph holds its addresses.

    Args:
        model: the target.
        shape: sizes.

    Raises:
        ValueError: larger trees than there are, or as many layers as the target has, or none.
    """

    def __init__(self, model: LlamaModel, shape: RunShape) -> None:
        if not 1 <= shape.num_layers < model.config.num_layers:
            most = model.config.num_layers - 1
            raise ValueError(f"num_layers: expected 1..{most}, got {shape.num_layers}")
        if shape.num_nodes > MAX_NODES:
            raise ValueError(f"num_levels, width: expected at most {MAX_NODES} nodes, got {shape}")
        self.model = model
        self.shape = shape
        batch, num_nodes = shape.batch, shape.num_nodes
        hidden = torch.zeros(2, batch * num_nodes, model.config.hidden_size)
        self._embedded, self._hidden = hidden
        self._tokens, self._parents = torch.zeros(2, batch * num_nodes, dtype=torch.int32)
        self._kv_len = torch.zeros(batch, dtype=torch.int32)
        self._table = torch.zeros(batch, shape.table_width, dtype=torch.int32)
        self._depth = torch.zeros(batch, num_nodes, dtype=torch.int32)
        self._bits = torch.zeros(batch, num_nodes, num_words(num_nodes), dtype=torch.int64)
        # The same memory through numpy, where small writes cost a tenth of torch's.
        self._marks, self._table_view = self._hidden.numpy()[:, 0], self._table.numpy()
        self._token_view, self._parent_view = self._tokens.numpy(), self._parents.numpy()
        self._depth_view, self._bits_view = self._depth.numpy(), self._bits.numpy().view(np.uint64)
        self._orders: dict[int, tuple[npt.NDArray[np.int64], torch.Tensor]] = {}
        parts = [self._level(level) for level in range(1 + shape.num_levels)]
        self.levels = tuple(part[0] for part in parts)
        self._inputs = [part[1] for part in parts]
        self._own_bits = np.zeros(self._bits_view.shape[1:], dtype=np.uint64)
        nodes = np.arange(num_nodes, dtype=np.uint64)
        self._own_bits[nodes, nodes // 64] = np.uint64(1) << nodes % 64
        self._write_static()
        self.cache: KVCache | None = None
        """The target's, whose pages its launches write; None while it lies idle."""
        self._home: ReferenceType[KVCache] | None = None
        self.num_begun = 0
        """Times it was begun: tells its rounds apart."""
        self._is_begun = False
        self._num_staged = 0
        self._is_in_order = True
        self._inner_taps = frozenset(layer_tap(index) for index in range(shape.num_layers - 1))

    # --- what a drafter does ------------------------------------------------------------------

    def stage(self, tokens: _Ints, parents: _Ints | None = None) -> None:
        """Copy in the next level: the root's at first. Never captured.

        Args:
            tokens: ``[B, F]``.
            parents: ``[B, F]``, nodes of the levels above; None for the root, and in a chain.

        Raises:
            ValueError: parents that are none, more levels than there is room for, or no trees
                were begun.
            IndexError: a token that is not in the vocabulary.
        """
        level = self._num_staged
        if not self._is_begun or level > self.shape.num_levels:
            most = 1 + self.shape.num_levels if self._is_begun else 0
            raise ValueError(f"stage: expected at most {most} levels, the root's included")
        if level and not self._is_run(level - 1):
            self._is_in_order = False  # what these rows will see is not there
        here = self._inputs[level]
        here.tokens[:] = tokens
        if level and self.shape.width > 1:
            self._see(level, parents)
        self.model.embed_tokens(here.ids, here.embedded)
        self._marks[here.first_row] = math.nan  # until it is launched
        self._num_staged = level + 1

    def launch(self, level: int) -> None:
        """Run a level that is staged; nothing but launches, so that a graph may capture it."""
        assert self.cache is not None, "a run is begun before it is launched"
        here, hidden = self.levels[level], self._inputs[level].embedded
        for index in range(self.shape.num_layers):
            self.model.launch_layer(index, hidden, here.rows, self.cache, here.hidden)
            hidden = here.hidden

    def staged(self, num_nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies ``[B, num_nodes]`` int32 of the first nodes' tokens and parents."""
        tokens, parents = self._first(num_nodes)
        return torch.from_numpy(tokens), torch.from_numpy(parents)

    # --- what the lender does -----------------------------------------------------------------

    def begin(self, batch: CacheBatch) -> None:
        """Start new trees behind what ``batch`` holds.

        Raises:
            ValueError: it was begun for another cache before.
        """
        if self._home is None:
            self._home = ref(batch.cache)
        if self._home() is not batch.cache:
            raise ValueError("run: expected one of this cache, got one of another engine's")
        self.model.reserve(self.shape.batch * self.shape.width, batch.num_positions)
        torch._foreach_copy_([self._kv_len, self._table], [batch.kv_len, batch.block_table])
        self.cache = batch.cache
        self.num_begun += 1
        self._num_staged, self._is_in_order, self._is_begun = 0, True, True

    def end(self) -> None:
        """From here on nothing is staged, and its launches write nobody's pages."""
        self._is_begun, self.cache = False, None
        self._table_view[:] = SCRATCH_PAGE

    # --- what verification asks ---------------------------------------------------------------

    def gives(self, taps: Sequence[str]) -> bool:
        """Whether a pass that starts behind the N layers can give these hidden states."""
        return self._inner_taps.isdisjoint(taps)

    def has_run(self, tree: DraftTree) -> bool:
        """Whether all nodes of B trees were run, as they stand there."""
        num_nodes = tree.draft_tokens.shape[1]
        last = -(-(num_nodes - 1) // self.shape.width)
        if last >= self._num_staged or not self._is_in_order or not self._is_run(last):
            return False
        tokens, parents = self._first(num_nodes)
        theirs = tree.draft_tokens.numpy(), tree.parents.numpy()
        if tokens.tobytes() == theirs[0].tobytes() and parents.tobytes() == theirs[1].tobytes():
            return True
        is_padding = np.arange(num_nodes) >= tree.num_nodes.numpy()[:, None]
        is_same = (tokens == theirs[0]) & (parents == theirs[1])
        return bool((is_same | is_padding).all())

    def copy_states(self, num_nodes: int, out: torch.Tensor) -> None:
        """The first nodes' states, tree by tree: ``out [B * num_nodes, H]``."""
        if self.shape.batch == 1:
            out.copy_(self._hidden[:num_nodes])
        else:
            out.copy_(self._hidden.index_select(0, self._order(num_nodes)[1]))

    # --- buffers ------------------------------------------------------------------------------

    def _level(self, level: int) -> tuple[RunLevel, _Inputs]:
        batch = self.shape.batch
        first, count = self._place(level)
        nodes, rows = slice(first, first + count), slice(batch * first, batch * (first + count))
        stands = StepRows(
            depth=self._depth[:, nodes],
            ancestors=self._bits[:, nodes],
            num_nodes=torch.full((batch,), count, dtype=torch.int32),
            first_node=torch.full((batch,), first, dtype=torch.int32),
            kv_len=self._kv_len,
            block_table=self._table,
        )
        tokens = self._token_view[rows].reshape(batch, count)
        parents = self._parent_view[rows].reshape(batch, count)
        inputs = _Inputs(tokens, parents, self._tokens[rows], self._embedded[rows], rows.start)
        return RunLevel(stands, self._hidden[rows]), inputs

    def _place(self, level: int) -> tuple[int, int]:
        """A level's first node and how many it has."""
        return (0, 1) if level == 0 else (1 + (level - 1) * self.shape.width, self.shape.width)

    def _write_static(self) -> None:
        """What no round changes: the root's, and all of a chain's, where a row has one parent."""
        self._inputs[0].parents[:] = -1
        self._bits_view[:, 0] = self._own_bits[0]
        if self.shape.width == 1:
            for level in range(1, 1 + self.shape.num_levels):
                self._see(level, np.full((self.shape.batch, 1), level - 1, dtype=np.int32))

    def _see(self, level: int, parents: _Ints | None) -> None:
        """Derive depth and ancestors of a level's nodes."""
        first, count = self._place(level)
        if parents is None or parents.min() < 0 or parents.max() >= first:
            raise ValueError(f"parents: expected nodes 0..{first - 1}, got {parents}")
        here, sequence = slice(first, first + count), np.arange(self.shape.batch)[:, None]
        self._inputs[level].parents[:] = parents
        self._depth_view[:, here] = self._depth_view[sequence, parents] + 1
        self._bits_view[:, here] = self._bits_view[sequence, parents] | self._own_bits[here]

    def _is_run(self, level: int) -> bool:
        """Whether a staged level was launched. (States that are NaN count as not run.)"""
        return not math.isnan(self._marks[self._inputs[level].first_row])

    def _first(self, num_nodes: int) -> tuple[_Ints, _Ints]:
        """Copies ``[B, num_nodes]`` of the first nodes' tokens and parents, tree by tree."""
        if self.shape.batch == 1:
            return self._token_view[None, :num_nodes].copy(), self._parent_view[
                None, :num_nodes
            ].copy()
        order = self._order(num_nodes)[0]
        return self._token_view[order], self._parent_view[order]

    def _order(self, num_nodes: int) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
        """Rows of the buffers ``[B, num_nodes]``, tree by tree, and flat as a tensor."""
        known = self._orders.get(num_nodes)
        if known is None:
            rows = np.arange(self.shape.batch * self.shape.num_nodes)
            levels = []
            for level in range(1 + self.shape.num_levels):
                first, count = self._place(level)
                some = rows[self.shape.batch * first : self.shape.batch * (first + count)]
                levels.append(some.reshape(self.shape.batch, count))
            order = np.concatenate(levels, axis=1)[:, :num_nodes].copy()
            known = self._orders[num_nodes] = order, torch.from_numpy(order.ravel())
        return known


class LowerLayers:
    """The target's first layers, lent to a drafter for one proposal.

    The engine makes one for each proposal, with the pages of the sequences that are asked about,
    closes it when the proposal is there, and hands it to verification.

    Args:
        model: the target.
        batch: the target's cache of those sequences.
    """

    def __init__(self, model: LlamaModel, batch: CacheBatch) -> None:
        self.model = model
        self._batch = batch
        self._run: LayerRun | None = None
        self._num_begun = 0
        self._rooms: list[int] = []
        self._held: list[tuple[CachedSequence, int]] = []
        self._is_open = True

    @property
    def cache(self) -> KVCache:
        """The target's; a run is for one."""
        return self._batch.cache

    @property
    def table_width(self) -> int:
        """Of the page table, as :class:`RunShape` has it; :meth:`reserve` may widen it."""
        return self._batch.block_table.shape[1]

    def reserve(self, num_nodes: Sequence[int]) -> list[int]:
        """Give sequences pages for trees of so many nodes, as far as there are any.

        Returns:
            How many nodes each has room for.
        """
        cache, sequences = self._batch.cache, self._batch.sequences
        has_more = False
        for sequence, count, room in zip(sequences, num_nodes, self._room(), strict=True):
            if count > room:
                has_more = True
                with suppress(MemoryError):
                    cache.reserve(sequence, sequence.length + min(count, MAX_NODES))
        if has_more:
            self._batch.update(sequences)
        return self._room()

    def begin(self, run: LayerRun) -> None:
        """Let ``run`` start trees behind these sequences; one that was begun before has ended.

        Raises:
            ValueError: it is another model's, another cache's or of another shape, or the proposal
                is made.
        """
        batch, size = self._batch, (len(self._batch.sequences), self.table_width)
        if not self._is_open:
            raise ValueError("lower: expected to be used while a proposal is made, got it later")
        if run.model is not self.model or run.shape[:2] != size:
            raise ValueError(
                f"run: expected one of this target for {size[0]} sequences and {size[1]} pages, "
                f"got {run.shape}{'' if run.model is self.model else ' of another target'}"
            )
        self._end()
        run.begin(batch)
        self._run, self._num_begun = run, run.num_begun
        self._held, self._rooms = _held(batch), self._room()

    def close(self) -> None:
        """The proposal is made: nothing can be run for these sequences any more."""
        self._is_open = False
        self._end()

    def take(self, tree: DraftTree, batch: CacheBatch, taps: Sequence[str] = ()) -> LayerRun | None:
        """The run behind which ``tree`` can be taken up, once; None if there is none.

        There is none where anything differs: a token, a parent, a node that was not run or has no
        page, the sequences, their order or lengths; or where ``taps`` asks for what came before.
        """
        run, self._run = self._run, None
        if run is None or run.num_begun != self._num_begun or not run.gives(taps):
            return None
        if batch.cache is not self._batch.cache or _held(batch) != self._held:
            return None
        size = tree.draft_tokens.shape[1]
        if size > min(self._rooms) and any(
            count > room for count, room in zip(tree.num_nodes.tolist(), self._rooms, strict=True)
        ):
            return None
        return run if run.has_run(tree) else None

    def _room(self) -> list[int]:
        """Nodes that each sequence has pages for."""
        size = self._batch.cache.page_size
        return [len(one.pages) * size - one.length for one in self._batch.sequences]

    def _end(self) -> None:
        run = self._run
        if run is not None and run.num_begun == self._num_begun:  # not lent to another since
            run.end()


def _held(batch: CacheBatch) -> list[tuple[CachedSequence, int]]:
    """Who was asked about, and when: a round makes every sequence longer."""
    return [(sequence, sequence.length) for sequence in batch.sequences]
