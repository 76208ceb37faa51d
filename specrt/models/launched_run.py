"""The first N layers of a target as launches alone: run by a drafter over chains, in its rounds.

As in :mod:`specrt.models.layer_run` a drafter says which tokens come next, and all else is the
run's: where rows stand, what they see, the states. But nothing is staged, uploaded or compared. A
level's launch looks its tokens up and writes down which they were, where nobody else writes; of a
level that is closed it writes that there is none. What is proposed are the chains as they are
written down there: they end before the first node that was not run. So verification takes them up
behind the N layers, where their states lie as a pass wants them.

B sequences, N nodes of a chain, its root included, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from specrt.cache import CacheBatch
from specrt.models.layer_run import RunLevel, can_start_behind, check_num_layers
from specrt.models.run_trees import RunShape
from specrt.models.step import StepRows
from specrt.tree import ChainTrees
from specrt.types import DraftTree, Proposal

if TYPE_CHECKING:
    from specrt.models.model import LlamaModel


class LaunchedRun:
    """Chains of one size behind the sequences of a batch, whose tables are read where they lie.

    A drafter calls :meth:`launch` for each level, and then :meth:`proposal`.

    Args:
        model: the target, on a GPU.
        batch: the target's cache of B sequences, whose tables stay where they are.
        roots: ``[B]`` int32 there: their last tokens.
        num_layers: that are run.
        num_levels: below the root.

    Raises:
        ValueError: larger trees than there are, or as many layers as the target has, or none.
    """

    def __init__(
        self,
        model: LlamaModel,
        batch: CacheBatch,
        roots: torch.Tensor,
        num_layers: int,
        num_levels: int,
    ) -> None:
        check_num_layers(num_layers, model.config)
        size, width = batch.block_table.shape
        self.shape = shape = RunShape(size, width, 1, num_levels, num_layers)
        shape.check()
        self.model = model
        self._batch, self._cache, self._roots = batch, batch.cache, roots
        device, num_nodes = model.device, shape.num_nodes
        model.reserve(size, 1, batch.num_positions)
        sizes = size, num_nodes, model.config.hidden_size
        self.states = device.zeros(*sizes, dtype=model.activation_dtype)
        """``[B, N, H]``: what the layers give."""
        numbers = torch.arange(num_nodes, dtype=torch.int32)[:, None].repeat(1, size)
        self._first_nodes = device.there(numbers)
        self._ones = device.there(torch.ones(size, dtype=torch.int32))
        # Its own, and what a drafter sees and may write to.
        self._chains, seen = (self._new_chains() for _ in range(2))
        self._levels = [self._level(level, self._chains) for level in range(num_nodes)]
        self.levels = tuple(self._level(level, seen) for level in range(num_nodes))
        """Where rows stand, and what becomes of them once they are launched."""
        self._stand_in = seen.draft_tokens
        self._num_launched, self._is_lent = 0, False
        self._proposed: Proposal | None = None

    @contextmanager
    def lent(self) -> Iterator[None]:
        """New chains begin; meanwhile levels can be launched, and at no other time."""
        self._num_launched, self._is_lent, self._proposed = 0, True, None
        try:
            yield
        finally:
            self._is_lent = False

    # --- what a drafter does ------------------------------------------------------------------

    def launch(
        self, tokens: torch.Tensor | None = None, is_open: torch.Tensor | None = None
    ) -> RunLevel:
        """Run the next level; nothing but launches.

        Args:
            tokens: ``[B]`` int32, may be strided, there: of the level; what is not in the
                vocabulary becomes the nearest that is. Not asked of the first level, the roots'.
            is_open: ``[B]`` int32 flags there: where all are 0 nothing is run, and the chains end
                before this level. None: all are open, as the roots' level is anyway.

        Returns:
            The level.

        Raises:
            ValueError: there is no further level, no token, or the run is not lent.
        """
        level = self._num_launched
        if not self._is_lent or level == self.shape.num_nodes:
            most = self.shape.num_nodes if self._is_lent else 0
            raise ValueError(f"launch: expected at most {most} levels, got another one")
        if level == 0:
            tokens, is_open = self._roots, None
        if tokens is None:
            raise ValueError(f"tokens: expected [B] int32 of level {level}, got None")
        rows, hidden = self._levels[level]
        ids = self._chains.draft_tokens[:, level]
        self.model.embed_tokens(tokens, rows, hidden, ids=ids, is_open=is_open)
        for index in range(self.shape.num_layers):
            self.model.launch_layer(index, hidden, rows, self._cache, hidden, is_open=is_open)
        self._num_launched = level + 1
        return self.levels[level]

    def proposal(self, num_nodes: torch.Tensor) -> Proposal:
        """The chains as they were run: this very object stands for them, whatever is written to it.

        Args:
            num_nodes: ``[B]`` int32 there: of each, its root included, at most.

        Raises:
            ValueError: not all levels were launched.
        """
        if self._num_launched < self.shape.num_nodes:
            expected = f"expected {self.shape.num_nodes} levels, got {self._num_launched}"
            raise ValueError(f"proposal: {expected}")
        self._proposed = Proposal(self._stand_in, self._stand_in, num_nodes)
        return self._proposed

    # --- what the lender asks -----------------------------------------------------------------

    def gives(self, taps: Sequence[str]) -> bool:
        """Whether a pass that starts behind the N layers can give these hidden states."""
        return can_start_behind(self.shape.num_layers, taps)

    def taken(self, proposal: Proposal) -> Proposal | None:
        """The chains that a drafter's proposal stands for, all of whose nodes were run; None where
        it is anything else."""
        if proposal is not self._proposed:
            return None
        return Proposal(self._chains.draft_tokens, self._chains.parents, proposal.num_nodes)

    # --- buffers ------------------------------------------------------------------------------

    def _new_chains(self) -> DraftTree:
        size, device = (self.shape.batch, self.shape.num_nodes), self.model.device
        return ChainTrees(device).of(device.zeros(*size, dtype=torch.int32))

    def _level(self, level: int, chains: DraftTree) -> RunLevel:
        nodes = self.shape.place(level)
        rows = StepRows(
            depth=chains.depth[:, nodes],
            ancestors=chains.ancestors[:, nodes],
            num_nodes=self._ones,
            first_node=self._first_nodes[level],
            kv_len=self._batch.kv_len,
            block_table=self._batch.block_table,
        )
        return RunLevel(rows, self.states[:, level])
