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
from specrt.draft.coupling import ROW_WORDS, Coupling, expand_scratch, write_sampling
from specrt.draft.eesd.checkpoint import NUM_MODES
from specrt.draft.eesd.model import ExitModel
from specrt.draft.staging import Staging
from specrt.models.layer_run import LayerRun, LowerLayers
from specrt.models.run_trees import Ints, RunShape
from specrt.models.step import StepRows
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
    next_tokens: Ints
    """``[B, b]``: the next level's, the same memory as ``tokens``; numpy's view on the CPU."""
    sources: Ints
    """``[B, K]``, the same memory as ``source``."""


class EesdBuffers:
    """The buffers of rounds of one :class:`EesdKey` and the steps over them.

    Args:
        key: sizes.
        exit_model: the exit, which knows its target.
        max_levels: drafted levels, at most.
    """

    def __init__(self, key: EesdKey, exit_model: ExitModel, max_levels: int) -> None:
        batch, width, target = key.batch, key.num_branches, exit_model.target
        hidden_size, vocab_size = target.config.hidden_size, target.config.vocab_size
        self.key = key
        self._exit = exit_model
        self._device = device = target.device
        self._is_chain = width == 1
        self._num_children = _CHAIN_CANDIDATES if self._is_chain else width
        rows = batch * width
        sizes = RunShape(batch, key.target_width, width, max_levels, exit_model.num_layers)
        self.run = LayerRun(target, sizes)
        self._exit_hidden = device.zeros(rows, hidden_size, dtype=target.activation_dtype)
        self._logits = device.zeros(rows, vocab_size)
        self._kv_len = device.zeros(batch, dtype=torch.int32)
        self._table = device.zeros(batch, key.exit_width, dtype=torch.int32)  # of one layer
        self._root_scores = device.zeros(batch, 1)
        self._root_candidates = device.zeros(batch, 1, dtype=torch.int32).fill_(-1)
        self._root_bits = device.zeros(batch, 1, _WORDS, dtype=torch.int64)
        sampling = {"sampling": ((batch, ROW_WORDS), torch.int64)}
        self._staging = Staging(device, {**sampling, "position": ((batch,), torch.int32)})
        self._coupling = Coupling(**self._staging.there) if key.is_coupled else None
        pool = (batch, self._num_children + max_levels * self._num_children**2)
        tokens, parents = device.zeros(2, *pool, dtype=torch.int32)
        self._pool = tokens, parents, device.zeros(*pool)
        self._scratch = expand_scratch(batch, width, vocab_size, self._num_children, device)
        self.levels = [self._level(level) for level in range(max_levels + 1)]

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
        # Of a chain every level is one node's, whose score is a root's: a token's is its own.
        scores, candidates, bits = self._root_scores, self._root_candidates, self._root_bits
        if level > 0 and not self._is_chain:
            above = self.levels[level - 1]
            scores, candidates, bits = above.scores, above.candidates, above.ancestors
        sampling, position = self._coupling or (None, None)
        ops.tree_expand(
            logits,
            scores,
            candidates,
            bits,
            None,
            sampling,
            position,
            level,
            self._scratch,
            *self._pool,
            here.tokens,
            here.scores,
            here.candidates,
            here.source,
            here.ancestors,
        )

    # --- staging: never captured --------------------------------------------------------------

    def stage(
        self, states: Sequence[SequenceState], lower: LowerLayers, drafts: CacheBatch
    ) -> None:
        """Copy in what a round starts from; both caches hold all tokens but the roots."""
        lower.begin(self.run)
        for width in {1, self.key.num_branches}:
            self._exit.reserve(self.key.batch, width, drafts.num_positions)
        for state, cached in zip(states, drafts.sequences, strict=True):
            is_even = cached.length == len(state.token_ids) - 1
            assert is_even, "the exit's cache lags behind the target's"
        torch._foreach_copy_([self._kv_len, self._table], [drafts.kv_len, drafts.block_table])
        if self._coupling is not None:
            host = self._staging.host
            write_sampling(states, host["sampling"], host["position"])
            self._staging.send()

    def stage_level(self, level: int) -> None:
        """Copy in the tokens of a level below the root, and whose children they are."""
        above, width = self.levels[level - 1], self.key.num_branches
        if self._is_chain:
            parents = None
        elif level == 1:
            parents = above.sources * 0
        else:
            parents = 1 + (level - 2) * width + above.sources % width
        self.run.stage(above.next_tokens, parents)

    # --- what comes of it ---------------------------------------------------------------------

    def said(self, level: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What a controller is told of the drafts behind ``level``: ``[B]`` float32 their score,
        and ``[B, 2]`` the evidence of a chain."""
        here = self.levels[level]
        if self._is_chain:
            return here.first_score, here.first_evidence
        return self._level_score(level), None

    def _level_score(self, level: int) -> torch.Tensor:
        """``[B]`` float32: log-probability that the path goes through the children of ``level``,
        given that it reached their parents (whose own share is 1 at the root)."""
        mass = self.levels[level].scores.logsumexp(dim=1)
        if level > 0:
            mass = mass - self.levels[level - 1].scores.logsumexp(dim=1)
        return mass.clamp_(max=0.0)

    def chain(self, num_levels: int) -> Chain:
        """What the first ``num_levels`` steps of a chain said."""
        levels = self.levels[:num_levels]
        parts = (
            [level.tokens[:, 0] for level in levels],
            [level.first_score for level in levels],
            [level.first_evidence for level in levels],
        )
        return Chain(*(self._device.read(torch.stack(part, dim=1)).numpy() for part in parts))

    # --- buffers ------------------------------------------------------------------------------

    def _level(self, level: int) -> Level:
        batch, width = self.key.batch, self.key.num_branches
        children, device = (batch, self._num_children), self._device
        ints = device.zeros(3, *children, dtype=torch.int32)
        evidence = device.zeros(batch, 1 if level == 0 else width, NUM_MODES)
        scores, rows = device.zeros(*children), self.run.levels[level].rows
        next_tokens, sources = ints[0][:, :width], ints[2]
        return Level(
            # Who sees whom is the same in both caches.
            exit_rows=replace(rows, kv_len=self._kv_len, block_tables=(self._table,)),
            evidence=evidence,
            first_evidence=evidence[:, 0],
            first_score=scores[:, 0],
            tokens=ints[0],
            scores=scores,
            candidates=ints[1],
            source=ints[2],
            ancestors=device.zeros(*children, _WORDS, dtype=torch.int64),
            next_tokens=next_tokens if device.is_gpu else next_tokens.numpy(),
            sources=sources if device.is_gpu else sources.numpy(),
        )


@dataclass(frozen=True, eq=False)
class EesdProposal(Proposal):
    """A proposal, and what its drafter wants to find when it hears what came of it."""

    num_branches: int = 1
    buffers: EesdBuffers | None = None
    """What it was drafted in; None of a root alone."""
    num_levels: int = 0
    """Drafted, dropped ones included."""

    @property
    def chain(self) -> Chain | None:
        """What the steps of a chain said, dropped drafts included; None where nothing was drafted,
        or a tree. To be read before the next proposal is made. (A GPU is waited for.)"""
        if self.buffers is None or self.num_branches != 1:
            return None
        return self.buffers.chain(self.num_levels)
