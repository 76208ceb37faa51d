"""The first N layers of a target, run by a drafter over a tree of its own.

Such a drafter says which tokens and parents a tree's next level has. Where rows stand and what they
see follows from that here, and here the states stay. Verification takes a tree up behind those
layers if it is the very tree that was run, for the very sequences; else it runs all layers. By row
invariance the bits are the same, so a drafter may be as wrong as it likes.

B sequences, F nodes of a level (1 at level 0, the root's; then ``width``), H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple
from weakref import ReferenceType, ref

import torch

from specrt.cache import SCRATCH_PAGE, CacheBatch, CachedSequence, KVCache
from specrt.config import ModelConfig
from specrt.models.run_trees import Ints, RunShape, make_trees
from specrt.models.step import StepRows, layer_tap
from specrt.tree import MAX_NODES
from specrt.types import DraftTree, Proposal

if TYPE_CHECKING:
    from specrt.models.model import LlamaModel


def check_num_layers(num_layers: int, config: ModelConfig) -> None:
    """Whether a drafter can run so many of a target's layers.

    Raises:
        ValueError: it cannot.
    """
    if not 1 <= num_layers < config.num_layers:
        most = config.num_layers - 1
        raise ValueError(f"num_layers: expected 1..{most}, got {num_layers}")


def can_start_behind(num_layers: int, taps: Sequence[str]) -> bool:
    """Whether a pass that starts behind so many layers can give these hidden states."""
    return not any(layer_tap(index) in taps for index in range(num_layers - 1))


class RunLevel(NamedTuple):
    """A level, to be read: where its rows stand in the target's cache, and what came of them."""

    rows: StepRows
    hidden: torch.Tensor
    """``[B * F, H]`` of the activations' dtype: what the first N layers give, once launched."""


class LayerRun:
    """Static buffers for the first N layers over growing trees, and the launches over them.

    What a drafter does for each level: :meth:`stage` (but for the root's, which is staged when a
    run begins), then :meth:`launch`, or the launch of a graph that captured it and
    :meth:`tell_launched`. Rows of the target's cache are written past ``kv_len``, each at its
    node's place. A run is for one cache, the first that it is begun for: a graph holds its
    addresses.

    Args:
        model: the target.
        shape: sizes.

    Raises:
        ValueError: larger trees than there are, or as many layers as the target has, or none.
    """

    def __init__(self, model: LlamaModel, shape: RunShape) -> None:
        check_num_layers(shape.num_layers, model.config)
        shape.check()
        self.model = model
        self.shape = shape
        device, num_rows = model.device, shape.batch * shape.num_nodes
        sizes = num_rows, model.config.hidden_size
        # Level after level.
        self._embedded, self._hidden = device.zeros(2, *sizes, dtype=model.activation_dtype)
        self._trees = make_trees(shape, self._hidden, model.config.vocab_size, device)
        self._kv_len = device.zeros(shape.batch, dtype=torch.int32)
        self._table = device.zeros(shape.batch, shape.table_width, dtype=torch.int32)
        self._starts = [self._kv_len, self._table, self._trees.roots]
        self._orders: dict[int, torch.Tensor] = {}
        self.levels = tuple(self._level(level) for level in range(1 + shape.num_levels))
        rows = [shape.rows(level) for level in range(1 + shape.num_levels)]
        self._embedded_at = [self._embedded[some] for some in rows]
        self.cache: KVCache | None = None
        """The target's, whose pages its launches write; None while it lies idle."""
        self._home: ReferenceType[KVCache] | None = None
        self.num_begun = 0
        """Times it was begun: tells its rounds apart."""
        self._is_begun = False
        self._num_staged = 0
        self._is_in_order = True

    # --- what a drafter does ------------------------------------------------------------------

    def stage(self, tokens: Ints, parents: Ints | None = None) -> None:
        """Copy in the next level. Never captured.

        On a GPU tokens and parents stay there: what is not in the vocabulary, or no node above,
        becomes the nearest that is.

        Args:
            tokens: ``[B, F]``, on the host or on the device.
            parents: ``[B, F]``, nodes of the levels above; None in a chain.

        Raises:
            ValueError: parents that are none, more levels than there is room for, or no trees
                were begun.
        """
        level = self._num_staged
        if not self._is_begun or level > self.shape.num_levels:
            most = self.shape.num_levels if self._is_begun else 0
            raise ValueError(f"stage: expected at most {most} levels below the root")
        if not self._trees.is_run(level - 1):
            self._is_in_order = False  # what these rows will see is not there
        self._trees.stage(level, tokens, parents)
        self._embed(level)
        self._num_staged = level + 1

    def launch(self, level: int) -> None:
        """Run a level that is staged; nothing but launches, so that a graph may capture it."""
        assert self.cache is not None, "a run is begun before it is launched"
        here, hidden = self.levels[level], self._embedded_at[level]
        for index in range(self.shape.num_layers):
            self.model.launch_layer(index, hidden, here.rows, self.cache, here.hidden)
            hidden = here.hidden
        self.tell_launched(level)

    def tell_launched(self, level: int) -> None:
        """A level's launches were made, by a graph of them: on a GPU nothing else would tell."""
        self._trees.tell_launched(level)

    def staged(self, num_nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, num_nodes]`` int32: the first nodes' tokens and parents, to be proposed.

        Copies on the CPU. On a GPU they are the run's own memory, and only a proposal of these very
        tensors is taken up: once anything is written there, or to a copy, all layers run.
        """
        return self._trees.staged(num_nodes)

    # --- what the lender does -----------------------------------------------------------------

    def begin(self, batch: CacheBatch, roots: torch.Tensor) -> None:
        """Start new trees behind what ``batch`` holds, with ``roots [B]`` int32 as level 0.

        Raises:
            ValueError: it was begun for another cache before.
        """
        if self._home is None:
            self._home = ref(batch.cache)
        if self._home() is not batch.cache:
            raise ValueError("run: expected one of this cache, got one of another engine's")
        for width in {1, self.shape.width}:
            self.model.reserve(self.shape.batch, width, batch.num_positions)
        torch._foreach_copy_(self._starts, [batch.kv_len, batch.block_table, roots])
        self._trees.begin()
        self._embed(0)
        self.cache = batch.cache
        self.num_begun += 1
        self._num_staged, self._is_in_order, self._is_begun = 1, True, True

    def end(self) -> None:
        """From here on nothing is staged, and its launches write nobody's pages."""
        self._is_begun, self.cache = False, None
        self._table.fill_(SCRATCH_PAGE)

    # --- what verification asks ---------------------------------------------------------------

    def gives(self, taps: Sequence[str]) -> bool:
        """Whether a pass that starts behind the N layers can give these hidden states."""
        return can_start_behind(self.shape.num_layers, taps)

    def has_run(self, tree: DraftTree, proposal: Proposal | None) -> bool:
        """Whether all nodes of B trees, settled of ``proposal``, were run as they stand there."""
        last = self.shape.last_level(tree.draft_tokens.shape[1])
        if last >= self._num_staged or not self._is_in_order or not self._trees.is_run(last):
            return False
        return self._trees.are(tree, proposal)

    def copy_states(self, num_nodes: int, out: torch.Tensor) -> None:
        """The first nodes' states, tree by tree: ``out [B * num_nodes, H]``."""
        if self.shape.batch == 1:
            out.copy_(self._hidden[:num_nodes])
        else:
            out.copy_(self._hidden.index_select(0, self._order(num_nodes)))

    # --- buffers ------------------------------------------------------------------------------

    def _embed(self, level: int) -> None:
        rows, out = self.levels[level].rows, self._embedded_at[level]
        self.model.embed_tokens(self._trees.ids(level), rows, out)

    def _level(self, level: int) -> RunLevel:
        nodes, device, batch = self.shape.place(level), self.model.device, self.shape.batch

        def of_each(value: int) -> torch.Tensor:
            return device.zeros(batch, dtype=torch.int32).fill_(value)

        stands = StepRows(
            depth=self._trees.depth[:, nodes],
            ancestors=self._trees.ancestors[:, nodes],
            num_nodes=of_each(nodes.stop - nodes.start),
            first_node=of_each(nodes.start),
            kv_len=self._kv_len,
            block_table=self._table,
        )
        return RunLevel(stands, self._hidden[self.shape.rows(level)])

    def _order(self, num_nodes: int) -> torch.Tensor:
        """Rows of the states, tree by tree."""
        order = self._orders.get(num_nodes)
        if order is None:
            rows = torch.from_numpy(self.shape.order()[:, :num_nodes].ravel().copy())
            order = self._orders[num_nodes] = self.model.device.there(rows)
        return order


class LowerLayers:
    """The target's first layers, lent to a drafter for one proposal.

    The engine makes one for each proposal, with the pages of the sequences that are asked about,
    closes it when the proposal is there, and hands it to verification.

    Args:
        model: the target.
        batch: the target's cache of those sequences.
        roots: ``[B]`` int32 where the model is: their last tokens, which all trees begin with.
    """

    def __init__(self, model: LlamaModel, batch: CacheBatch, roots: torch.Tensor) -> None:
        self.model = model
        self._batch = batch
        self._roots = roots
        self._run: LayerRun | None = None
        self._num_begun = 0
        self._rooms: list[int] = []
        self._held: list[tuple[CachedSequence, int]] = []
        self._is_open = True
        self._proposal: Proposal | None = None

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
        run.begin(batch, self._roots)
        self._run, self._num_begun = run, run.num_begun
        self._held, self._rooms = _held(batch), self._room()

    def close(self) -> None:
        """The proposal is made: nothing can be run for these sequences any more."""
        self._is_open = False
        self._end()

    def take_proposal(self, proposal: Proposal) -> None:
        """What was proposed, and is not to be changed any more: all trees are settled of it."""
        self._proposal = proposal

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
            count > room for count, room in zip(self._counts(tree), self._rooms, strict=True)
        ):
            return None
        return run if run.has_run(tree, self._proposal) else None

    def _counts(self, tree: DraftTree) -> list[int]:
        """Nodes that each tree may have: of one on a GPU, as many as there are pages for."""
        if self.model.device.is_gpu:
            return [min(tree.draft_tokens.shape[1], room) for room in self._room()]
        counts: list[int] = tree.num_nodes.tolist()
        return counts

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
