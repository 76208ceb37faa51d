"""One drafting round of EESD: static buffers, and the steps that a graph can run again.

B sequences, b branches (1: a chain), N the layers of the target that are run. Level 0 is the root;
level l holds the b nodes drafted from level l - 1, which are tree nodes 1 + (l - 1) * b on. A row
has its node's place in both caches, the target's and the exit's, so an accepted path is committed
to both and none of it is run again. The target's part of a round is a :class:`LayerRun`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import ReferenceType

import numpy as np
import torch

from specrt import ops
from specrt.cache import CacheBatch, KVCache
from specrt.draft.coupling import Coupling
from specrt.draft.eesd.checkpoint import NUM_MODES
from specrt.draft.eesd.costs import RoundTimes
from specrt.draft.eesd.model import ExitModel
from specrt.draft.length.control import ControlRound
from specrt.models.layer_run import LayerRun, LowerLayers, RunShape
from specrt.models.step import StepRows
from specrt.ops.tree_build import expand_workspace_size
from specrt.tree import MAX_NODES, num_words
from specrt.types import Proposal, SequenceState

MAX_DRAFT_NODES = 62
"""Nodes below the root: with it, their ancestor bits fit one signed word."""
_WORDS = num_words(MAX_NODES)
_CHAIN_CANDIDATES = 2  # in a chain, the runner-up tells how sure a coupled draft is


@dataclass(frozen=True)
class EesdKey:
    """What a round's buffers are made for."""

    cache: ReferenceType[KVCache]
    """The target's."""
    batch: int
    target_width: int
    """Of the target's page table."""
    exit_width: int
    num_branches: int
    is_coupled: bool


class Chain(NamedTuple):
    """What a chain's steps said, in their order."""

    tokens: np.ndarray
    """``[B, k]`` int32"""
    scores: np.ndarray
    """``[B, k]`` float32: log-probability of each draft; coupled, of the noisy logits among the
    two best."""
    evidence: np.ndarray
    """``[B, k, 2]`` float32: the calibration head's, for greedy and for coupled drafts."""


@dataclass(frozen=True)
class Level:
    """What a level's F rows (1 at level 0, else b) say, and the K best children they were given."""

    exit_rows: StepRows
    """Where they stand in the exit's cache."""
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
    next_tokens: np.ndarray
    """``[B, b]``: the next level's, the same memory as ``tokens``."""
    sources: np.ndarray
    """``[B, K]``, the same memory as ``source``."""


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
        sizes = RunShape(batch, key.target_width, width, max_levels, exit_model.num_layers)
        self.run = LayerRun(exit_model.target, sizes)
        self._exit_hidden = torch.zeros(rows, config.hidden_size)
        self._logits = torch.zeros(rows, config.vocab_size)
        self._kv_len = torch.zeros(batch, dtype=torch.int32)
        self._table = torch.zeros(batch, key.exit_width, dtype=torch.int32)
        self._roots = np.zeros((batch, 1), dtype=np.int32)
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
        self.levels = [self._level(level) for level in range(max_levels + 1)]
        self._kv_len_view = self._kv_len.numpy()

    # --- steps: nothing but launches on static buffers ----------------------------------------

    def draft(self, level: int, drafts: KVCache) -> None:
        """Run the rows of ``level`` through the draft model, and rank their children."""
        here, states = self.levels[level], self.run.levels[level].hidden
        rows = states.shape[0]
        logits = self._logits[:rows]
        self.run.launch(level)
        self._exit.launch_exit(
            states,
            here.exit_rows,
            drafts,
            self._exit_hidden[:rows],
            logits,
            here.evidence.view(rows, NUM_MODES),
        )
        self._rank(level, logits.view(self.key.batch, -1, logits.shape[-1]))

    def close(self, level: int, drafts: KVCache) -> None:
        """Run the rows of the last level as far as verification and the next round need it."""
        self.run.launch(level)
        self._exit.launch_kv(self.run.levels[level].hidden, self.levels[level].exit_rows, drafts)

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

    # --- staging: never captured --------------------------------------------------------------

    def stage(
        self, states: Sequence[SequenceState], lower: LowerLayers, drafts: CacheBatch
    ) -> None:
        """Copy in what a round starts from; both caches hold all tokens but the roots."""
        lower.begin(self.run)
        self._exit.reserve(self._num_rows, drafts.num_positions)
        self._table.copy_(drafts.block_table)
        for row, state in enumerate(states):
            held = drafts.sequences[row].length
            assert held == len(state.token_ids) - 1, "the exit's cache lags behind the target's"
            self._kv_len_view[row] = held
            self._roots[row] = state.token_ids[-1]
        if self._coupling is not None:
            self._coupling.stage(states)
            levels = torch.arange(len(self.levels), dtype=torch.int32)[:, None]
            torch.add(levels, self._coupling.position, out=self._positions)

    def stage_level(self, level: int) -> None:
        """Copy in the tokens of a level, and whose children they are."""
        if level == 0:
            self.run.stage(self._roots)
            return
        above, width = self.levels[level - 1], self.key.num_branches
        if self._is_chain:
            parents = None
        elif level == 1:
            parents = np.zeros_like(above.sources)
        else:
            parents = 1 + (level - 2) * width + above.sources % width
        self.run.stage(above.next_tokens, parents)

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

    def tree(self, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, parents and node counts of ``lengths`` levels below each sequence's root."""
        counts = [1 + length * self.key.num_branches for length in lengths]
        return *self.run.staged(max(counts)), torch.from_numpy(np.array(counts, dtype=np.int32))

    # --- buffers ------------------------------------------------------------------------------

    def _level(self, level: int) -> Level:
        batch, width = self.key.batch, self.key.num_branches
        children = (batch, self._num_children)
        ints = torch.zeros(3, *children, dtype=torch.int32)
        evidence = torch.zeros(batch, 1 if level == 0 else width, NUM_MODES)
        scores, rows = torch.zeros(children), self.run.levels[level].rows
        return Level(
            # Who sees whom is the same in both caches.
            exit_rows=replace(rows, kv_len=self._kv_len, block_table=self._table),
            evidence=evidence,
            first_evidence=evidence[:, 0],
            first_score=scores[:, 0],
            tokens=ints[0],
            scores=scores,
            candidates=ints[1],
            source=ints[2],
            ancestors=torch.zeros(*children, _WORDS, dtype=torch.int64),
            next_tokens=ints[0].numpy()[:, :width],
            sources=ints[2].numpy(),
        )


@dataclass(frozen=True, eq=False)
class EesdProposal(Proposal):
    """A proposal, and what its drafter wants to find when it hears what came of it."""

    times: RoundTimes | None = None
    """None where the drafter rests: nothing is measured, and no controller was asked."""
    control: ControlRound | None = None
    """What decided on its length, if anybody did."""
    num_branches: int = 1
    buffers: EesdBuffers | None = None
    """What it was drafted in; None of a root alone."""
    num_levels: int = 0
    """Drafted, dropped ones included."""

    @property
    def chain(self) -> Chain | None:
        """What the steps of a chain said, dropped drafts included; None where nothing was drafted,
        or a tree. To be read before the next proposal is made."""
        if self.buffers is None or self.num_branches != 1:
            return None
        return self.buffers.chain(self.num_levels)
