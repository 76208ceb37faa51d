"""One drafting round of EESD: static buffers, and the steps that a graph can run again.

B sequences, b branches (1: a chain), N the layers of the target that are run. Level 0 is the root;
level l holds the b nodes drafted from level l - 1, which are tree nodes 1 + (l - 1) * b on. A row
has its node's place in both caches, the target's and the exit's, so an accepted path is committed
to both and none of it is run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from specrt import ops
from specrt.cache import CacheBatch, KVCache
from specrt.draft.coupling import Coupling
from specrt.draft.eesd.checkpoint import NUM_MODES
from specrt.draft.eesd.model import ExitModel
from specrt.models.step import StepRows
from specrt.ops.tree_build import expand_workspace_size
from specrt.tree import MAX_NODES, chain, num_words
from specrt.types import Proposal, SequenceState

MAX_DRAFT_NODES = 62
"""Nodes below the root: with it, their ancestor bits fit one signed word."""
_WORDS = num_words(MAX_NODES)
_CHAIN_CANDIDATES = 2  # in a chain, the runner-up tells how sure a coupled draft is


@dataclass(frozen=True)
class EesdKey:
    """What a round's buffers are sized for."""

    batch: int
    target_width: int
    """Of the target's page table."""
    exit_width: int
    num_branches: int
    is_coupled: bool


class Chain(NamedTuple):
    """What a chain's steps said, in their order; valid until the next proposal."""

    tokens: np.ndarray
    """``[B, k]`` int32"""
    scores: np.ndarray
    """``[B, k]`` float32: log-probability of each draft; coupled, of the noisy logits among the
    two best."""
    evidence: np.ndarray
    """``[B, k, 2]`` float32: the calibration head's, for greedy and for coupled drafts."""


@dataclass(frozen=True)
class Level:
    """A level's F rows (1 at level 0, else b), and the K best children they were given."""

    inputs: torch.Tensor
    """``[B * F]`` int32: the rows' tokens."""
    embedded: torch.Tensor
    """``[B * F, H]`` float32, shared by all levels."""
    hidden: torch.Tensor
    """``[B * F, H]`` float32: what the target's first N layers give."""
    target_rows: StepRows
    exit_rows: StepRows
    evidence: torch.Tensor
    """``[B, F, 2]`` float32"""
    first_evidence: torch.Tensor
    """``[B, 2]``: of the first row."""
    first_score: torch.Tensor
    """``[B]``: of the best child."""
    tokens: torch.Tensor
    """``[B, K]`` int32, and so those below; best child first."""
    scores: torch.Tensor
    """float32: log-probability of the path; in a chain, of the child alone."""
    candidates: torch.Tensor
    source: torch.Tensor
    """``b * F + f`` of the parent."""
    ancestors: torch.Tensor
    """``[B, K, W]`` int64 bits over drafted nodes."""


class EesdBuffers:
    """The buffers of rounds of one :class:`EesdKey` and the steps over them.

    Args:
        key: sizes.
        exit_model: the exit, which knows its target.
        max_levels: drafted levels, at most.
    """

    def __init__(self, key: EesdKey, exit_model: ExitModel, max_levels: int) -> None:
        batch, width = key.batch, key.num_branches
        config = exit_model.target.config
        self.key = key
        self._exit = exit_model
        self._is_chain = width == 1
        self._num_children = _CHAIN_CANDIDATES if self._is_chain else width
        self._num_rows = rows = batch * width
        # Level after level, so that one sequence's states lie in the order of its tree.
        self._hidden = torch.zeros(batch * (1 + max_levels * width), config.hidden_size)
        self._embedded = torch.zeros(rows, config.hidden_size)
        self._exit_hidden = torch.zeros(rows, config.hidden_size)
        self._logits = torch.zeros(rows, config.vocab_size)
        self._kv_lens = torch.zeros(2, batch, dtype=torch.int32)  # without the root, and with it
        self._tables = [
            torch.zeros(batch, table_width, dtype=torch.int32)
            for table_width in (key.target_width, key.exit_width)
        ]
        self._roots = torch.zeros(batch, 1, dtype=torch.int32)
        self._root_scores = torch.zeros(batch, 1)
        self._root_candidates = torch.full((batch, 1), -1, dtype=torch.int32)
        self._root_bits = torch.zeros(batch, 1, _WORDS, dtype=torch.int64)
        # Positions level by level: a chain's every step ranks the children of a root.
        self._positions = torch.zeros(max_levels + 1, batch, dtype=torch.int32)
        self._coupling = Coupling.make(batch) if key.is_coupled else None
        deep = 0 if self._is_chain else max_levels
        pool = (batch, self._num_children + deep * self._num_children**2)
        tokens, parents = torch.zeros(2, *pool, dtype=torch.int32)
        self._pool = tokens, parents, torch.zeros(pool)
        num_parts = max(1, min(rows, torch.get_num_threads()))
        self._scratch = torch.empty(num_parts, expand_workspace_size(config.vocab_size))
        self.levels: list[Level] = []
        for _ in range(max_levels + 1):
            self.levels.append(self._next_level())
        self._chains: dict[int, tuple[np.ndarray, Proposal]] = {}
        # The same memory through numpy, where small copies cost a tenth of torch's.
        self._roots_view = self._roots.numpy()[:, 0]
        self._kv_lens_view = self._kv_lens.numpy()
        self._children_views = [level.tokens.numpy()[:, 0] for level in self.levels]

    # --- steps: nothing but launches on static buffers ----------------------------------------

    def embed(self, level: int) -> None:
        """Copy in the embeddings of a level's tokens; not to be captured."""
        here = self.levels[level]
        self._exit.target.embed_tokens(here.inputs, here.embedded)

    def draft(self, level: int, target: KVCache, drafts: KVCache) -> None:
        """Run the rows of ``level`` through the draft model, and rank their children."""
        here, rows = self.levels[level], self.levels[level].hidden.shape[0]
        logits = self._logits[:rows]
        self._exit.launch_lower(here.embedded, here.target_rows, target, here.hidden)
        self._exit.launch_exit(
            here.hidden,
            here.exit_rows,
            drafts,
            self._exit_hidden[:rows],
            logits,
            here.evidence.view(rows, NUM_MODES),
        )
        self._rank(level, logits.view(self.key.batch, -1, logits.shape[-1]))

    def close(self, level: int, target: KVCache, drafts: KVCache) -> None:
        """Run the rows of the last level as far as verification and the next round need it."""
        here = self.levels[level]
        self._exit.launch_lower(here.embedded, here.target_rows, target, here.hidden)
        self._exit.launch_kv(here.hidden, here.exit_rows, drafts)

    def _rank(self, level: int, logits: torch.Tensor) -> None:
        here = self.levels[level]
        scores, candidates, bits = self._root_scores, self._root_candidates, self._root_bits
        if level > 0 and not self._is_chain:
            above = self.levels[level - 1]
            scores, candidates, bits = above.scores, above.candidates, above.ancestors
        ops.tree_expand(
            logits,
            scores,
            candidates,
            bits,
            None,
            *self._coupling_of(level),
            0 if self._is_chain else level,
            self._scratch,
            *self._pool,
            here.tokens,
            here.scores,
            here.candidates,
            here.source,
            here.ancestors,
        )

    def _coupling_of(self, level: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self._coupling is None:
            return None, None
        position = self._positions[level] if self._is_chain else self._coupling.position
        return self._coupling.sampling, position

    # --- staging ------------------------------------------------------------------------------

    def stage(
        self, states: Sequence[SequenceState], target: CacheBatch, drafts: CacheBatch
    ) -> None:
        """Copy in what a round starts from; both caches hold all tokens but the roots."""
        held = [[sequence.length for sequence in batch.sequences] for batch in (target, drafts)]
        assert held[0] == held[1], "the exit's cache lags behind the target's"
        self._exit.reserve(self._num_rows, max(target.num_positions, drafts.num_positions))
        self._kv_lens_view[0] = held[0]
        self._kv_lens_view[1] = self._kv_lens_view[0] + 1
        torch._foreach_copy_(self._tables, [target.block_table, drafts.block_table])
        for row, state in enumerate(states):
            self._roots_view[row] = state.token_ids[-1]
        if self._coupling is not None:
            self._coupling.stage(states)
            levels = torch.arange(len(self.levels), dtype=torch.int32)[:, None]
            torch.add(levels, self._coupling.position, out=self._positions)

    # --- what comes of it ---------------------------------------------------------------------

    def level_score(self, level: int) -> torch.Tensor:
        """``[B]`` float32: log-probability that the path goes through the children of ``level``,
        given that it reached their parents (whose own share is 1 at the root)."""
        mass = self.levels[level].scores.logsumexp(dim=1)
        if level > 0:
            mass = mass - self.levels[level - 1].scores.logsumexp(dim=1)
        return mass.clamp_(max=0.0)

    def chain(self, num_levels: int) -> Chain:
        """What the first ``num_levels`` steps of a chain said."""
        levels = self.levels[:num_levels]
        return Chain(
            np.stack([level.tokens.numpy()[:, 0] for level in levels], axis=1),
            np.stack([level.scores.numpy()[:, 0] for level in levels], axis=1),
            np.stack([level.evidence.numpy()[:, 0] for level in levels], axis=1),
        )

    def tree(self, lengths: Sequence[int]) -> Proposal:
        """The tree below the roots, ``lengths`` levels of each sequence; valid until the next."""
        num_levels = max(lengths)
        tree = self._chain_tree(num_levels) if self._is_chain else self._branched(num_levels)
        if self._is_chain and self.key.batch > 1:  # of one sequence the states are a view
            tree = replace(tree, hidden=self._states(num_levels))
        if min(lengths) < num_levels:
            counts = [1 + length * self.key.num_branches for length in lengths]
            tree = replace(tree, num_nodes=torch.tensor(counts, dtype=torch.int32))
        return tree

    def _chain_tree(self, num_levels: int) -> Proposal:
        """A chain, in buffers of its own."""
        known = self._chains.get(num_levels)
        if known is None:
            tokens = torch.zeros(self.key.batch, 1 + num_levels, dtype=torch.int32)
            tree = self._with_states(chain(tokens), num_levels)
            known = self._chains[num_levels] = tokens.numpy(), tree
        tokens_view, tree = known
        tokens_view[:, 0] = self._roots_view
        for level, children in enumerate(self._children_views[:num_levels], start=1):
            tokens_view[:, level] = children
        return tree

    def _with_states(self, tree: Proposal, num_levels: int) -> Proposal:
        hidden, num_layers = self._states(num_levels), self._exit.num_layers
        return replace(tree, hidden=hidden, num_layers_run=num_layers)

    def _tokens(self, level: int) -> torch.Tensor:
        """``[B, F]``: the tokens of a level's rows."""
        if level == 0:
            return self._roots
        return self.levels[level - 1].tokens[:, : self.key.num_branches]

    def _states(self, num_levels: int) -> torch.Tensor:
        """``[B, N, H]`` of the root and ``num_levels`` levels."""
        batch, hidden_size = self.key.batch, self._hidden.shape[1]
        if batch == 1:
            return self._hidden[: 1 + num_levels * self.key.num_branches][None]
        levels = self.levels[: num_levels + 1]
        return torch.cat([level.hidden.view(batch, -1, hidden_size) for level in levels], dim=1)

    def _branched(self, num_levels: int) -> Proposal:
        """A tree of b nodes a level."""
        batch, width = self.key.batch, self.key.num_branches
        tokens = torch.cat([self._tokens(level) for level in range(num_levels + 1)], dim=1)
        parents = [torch.full((batch, 1), -1, dtype=torch.int32)]
        for level in range(1, num_levels + 1):
            above = self.levels[level - 1]
            if level == 1:
                parents.append(torch.zeros(batch, width, dtype=torch.int32))
            else:
                parents.append(1 + (level - 2) * width + above.source % width)
        num_nodes = torch.full((batch,), tokens.shape[1], dtype=torch.int32)
        tree = Proposal(tokens, torch.cat(parents, dim=1), num_nodes)
        return self._with_states(tree, num_levels)

    # --- buffers ------------------------------------------------------------------------------

    def _next_level(self) -> Level:
        level, batch, width = len(self.levels), self.key.batch, self.key.num_branches
        count = 1 if level == 0 else width
        first = 0 if level == 0 else batch * (1 + (level - 1) * width)
        children = (batch, self._num_children)
        target_rows, exit_rows = self._rows(level, count)
        tokens = self._tokens(level)
        ints = torch.zeros(3, *children, dtype=torch.int32)
        evidence, scores = torch.zeros(batch, count, NUM_MODES), torch.zeros(children)
        return Level(
            # One dimension without a copy: a chain's level has one row a sequence.
            inputs=tokens[:, 0] if self._is_chain else tokens.view(-1),
            embedded=self._embedded[: batch * count],
            hidden=self._hidden[first : first + batch * count],
            target_rows=target_rows,
            exit_rows=exit_rows,
            evidence=evidence,
            first_evidence=evidence[:, 0],
            first_score=scores[:, 0],
            tokens=ints[0],
            scores=scores,
            candidates=ints[1],
            source=ints[2],
            ancestors=torch.zeros(*children, _WORDS, dtype=torch.int64),
        )

    def _rows(self, level: int, count: int) -> tuple[StepRows, StepRows]:
        """Where a level's rows stand in the target's cache, and in the exit's.

        Below the root, it counts as prefix: drafted nodes are numbered from 0, as
        ``tree_expand`` numbers them.
        """
        batch = self.key.batch
        above = max(0, level - 1)
        if level == 0 or self._is_chain:
            bits = torch.zeros(batch, count, _WORDS, dtype=torch.int64)
            bits[:, :, 0] = (1 << (above + 1)) - 1
        else:
            bits = self.levels[level - 1].ancestors
        depth = torch.full((batch, count), above, dtype=torch.int32)
        num_nodes = torch.full((batch,), count, dtype=torch.int32)
        first = torch.full((batch,), above * count, dtype=torch.int32)
        kv_len = self._kv_lens[int(level > 0)]
        rows = [StepRows(depth, bits, num_nodes, first, kv_len, table) for table in self._tables]
        return rows[0], rows[1]
