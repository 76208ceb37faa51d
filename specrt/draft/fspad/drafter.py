"""FSPAD, EAGLE-2 and the ablations between them: one trained layer drafts a tree of tokens.

The drafter reads the target's final features. Each round it runs its layer over the newly accepted
pairs (feature f_t, token e_{t+1}), then level by level over the best ``top_k`` nodes, and keeps the
most probable nodes of all levels (arXiv 2408.15562, section 3; EAGLE-2, arXiv 2406.16858). Trees
are deterministic, so acceptance draws from the target alone.

On the CPU a round is a handful of captured steps (one for the accepted pairs, one a level, one for
the choice of nodes), so that drafting can stop at any level.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from specrt.cache import CacheBatch, CachedSequence, KVCache
from specrt.draft.base import Budget, DraftParams
from specrt.draft.fspad.layer import Activations, DraftLayer, Rows
from specrt.draft.fspad.round import MAX_LEVELS, MAX_PAIRS, RoundBuffers, RoundKey
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.controlled import ControlledPolicy
from specrt.draft.length.measured import MeasuredPolicy, TreePolicy, TreeRound
from specrt.models.step import FINAL_TAP
from specrt.reuse import Recent
from specrt.tree import MAX_NODES, chain
from specrt.types import AcceptResult, Proposal, SequenceState


class _Shape(NamedTuple):
    depth: int
    top_k: int
    total_tokens: int


_EAGLE2 = _Shape(depth=6, top_k=10, total_tokens=60)
_AUTO = _Shape(depth=9, top_k=4, total_tokens=64)
_MAX_ROUNDS = 32  # kinds of round whose buffers are kept


@dataclass(eq=False)
class _Draft:
    """What is kept for one sequence."""

    cached: CachedSequence
    pending: torch.Tensor
    """``[m, H]``: features whose pairs have not been run."""

    def add(self, features: torch.Tensor) -> None:
        """Take features ``[n, H]``, which are valid only now."""
        self.pending = torch.cat([self.pending, features])


class _Plan(NamedTuple):
    """What a round may draft."""

    top_k: int
    num_levels: int
    num_nodes: int
    round: TreeRound | None
    """Decides how many of these levels and nodes there are; None: all."""


@dataclass(frozen=True, eq=False)
class _Offer(Proposal):
    """A proposal whose size was chosen by what its nodes were believed to be worth."""

    scores: np.ndarray = field(kw_only=True)
    """``[B, N - 1]``, of the drafted nodes."""
    round: TreeRound = field(kw_only=True)


class FspadDrafter:
    """Drafts with one trained layer over the target's features.

    Without :class:`DraftParams` it chooses depth and size by measured cost, and whether to draft at
    all; what is left open of given ones is EAGLE-2's (depth 6, top_k 10, 60 nodes).

    Args:
        layer: the layer and its weights.
        is_coupled: rank candidates with the noise the target will draw with, where the temperature
            is above 0. Moves trees, never tokens.
    """

    taps: tuple[str, ...] = (FINAL_TAP,)

    def __init__(
        self,
        layer: DraftLayer,
        *,
        is_coupled: bool = True,
        control: ControlOptions | None = None,
    ) -> None:
        self.layer = layer
        self.is_coupled = is_coupled
        self._device = layer.device
        self._cache = KVCache(layer.padded, layer.weights.fc.dtype, device=self._device)
        self._drafts: dict[SequenceState, _Draft] = {}
        self._policy: TreePolicy = (
            MeasuredPolicy() if control is None else ControlledPolicy(control)
        )
        self._rounds: Recent[RoundKey, RoundBuffers] = Recent(_MAX_ROUNDS)
        self._batch = CacheBatch(self._cache)

    # --- the protocol -------------------------------------------------------------------------

    @property
    def cache(self) -> KVCache:
        """Its keys and values."""
        return self._cache

    def check(self, params: DraftParams) -> None:
        """Whether the draft vocabulary and a round's buffers have room for such trees.

        Raises:
            ValueError: ``depth`` and ``top_k`` do not fit 128 draft nodes or the draft vocabulary.
        """
        self._shape(params)

    def start(self, state: SequenceState) -> None:
        """Open an empty draft cache."""
        hidden = self.layer.config.layer.hidden_size
        self._drafts[state] = _Draft(self._cache.open(), torch.empty(0, hidden))

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """Run the prompt's pairs but the last, whose output the first tree grows from."""
        self._drafts[state].add(taps[FINAL_TAP][0])
        self._absorb(state, keep=1)

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """Run the newly accepted pairs, then grow a tree level by level.

        Raises:
            ValueError: as :meth:`check`.
        """
        for state in states:
            if len(self._drafts[state].pending) > MAX_PAIRS:
                self._absorb(state, keep=1)
        plan = self._plan(states, budget)
        if plan is None:
            roots = [[state.token_ids[-1]] for state in states]
            return chain(torch.tensor(roots, dtype=torch.int32))
        batch = self._batch_of(states, plan)
        buffers = self._buffers(states, batch, plan)
        begun = perf_counter()
        is_known = self._extend(states, batch, buffers)
        extended = perf_counter()
        num_levels, are_known = self._grow(plan, batch, buffers, budget)
        if is_known and are_known:
            levels_ms = 1e3 * (perf_counter() - extended)
            self._policy.observe_draft(1e3 * (extended - begun), levels_ms, num_levels - 1)
        return self._choose(buffers, plan, num_levels, budget)

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Keep the features of the accepted path, which the next tree grows from."""
        lengths, paths, features = result.lengths, result.paths, taps[FINAL_TAP]
        for row, state in enumerate(states):
            path = result.path[row, : max(0, lengths[row] + 1)].long()
            self._drafts[state].add(features[row].index_select(0, path))
        if isinstance(proposal, _Offer):
            is_accepted = np.zeros(proposal.scores.shape)
            for row, length in enumerate(lengths):
                is_accepted[row, paths[row, 1 : max(0, length) + 1] - 1] = 1.0
            proposal.round.observe_outcome(proposal.scores, is_accepted)

    def finish(self, state: SequenceState) -> None:
        """Free the sequence's pages."""
        draft = self._drafts.pop(state, None)
        if draft is not None:
            self._cache.close(draft.cached)

    # --- a round ------------------------------------------------------------------------------

    def _shape(self, params: DraftParams) -> _Shape:
        num_rows = self.layer.weights.head.shape[0]
        default = _AUTO if params == DraftParams() else _EAGLE2
        # What is left open gives way to what was asked for. Room is for levels below the first.
        num_below = max(1, (params.depth or 1) - 1)
        top_k = params.top_k or min(default.top_k, num_rows, MAX_NODES // num_below)
        deepest = min(default.depth, 1 + MAX_NODES // top_k)
        depth = deepest if params.depth is None else params.depth
        total = params.total_tokens or default.total_tokens
        if top_k > num_rows:
            raise ValueError(
                f"top_k: expected at most the draft vocabulary {num_rows}, got {top_k}"
            )
        if (depth - 1) * top_k > MAX_NODES or depth > MAX_LEVELS:
            raise ValueError(
                f"depth, top_k: expected depth <= {MAX_LEVELS} and at most {MAX_NODES} nodes "
                f"expanded below the root, got {depth} and {top_k}"
            )
        return _Shape(depth, top_k, total)

    def _plan(self, states: Sequence[SequenceState], budget: Budget) -> _Plan | None:
        """None: the root alone."""
        depth, top_k, total = self._shape(budget.params)
        # The bonus token takes the last place.
        num_levels = min(depth, max(state.num_left for state in states) - 1)
        num_nodes = min(total, budget.max_nodes)
        has_features = all(len(self._drafts[state].pending) for state in states)
        if num_levels < 1 or num_nodes < 2 or not has_features:
            return None
        if budget.params != DraftParams():
            return _Plan(top_k, num_levels, num_nodes, None)
        chosen = self._policy.begin()
        return None if chosen is None else _Plan(top_k, num_levels, num_nodes, chosen)

    def _extend(
        self, states: Sequence[SequenceState], batch: CacheBatch, buffers: RoundBuffers
    ) -> bool:
        drafts = [self._drafts[state] for state in states]
        most = buffers.stage(states, batch, [draft.pending for draft in drafts])
        is_known = self._run(buffers, -most, lambda: buffers.extend(most, batch))
        batch.commit(buffers.pair_path, buffers.num_pairs)
        for draft in drafts:
            draft.pending = draft.pending[:0]
        return is_known

    def _grow(
        self, plan: _Plan, batch: CacheBatch, buffers: RoundBuffers, budget: Budget
    ) -> tuple[int, bool]:
        """Levels there are then, the root's children included; whether all steps were known."""
        are_known, masses = True, []
        for level in range(1, plan.num_levels + 1):
            if plan.round is not None:
                masses.append(plan.round.mass(buffers.scores(level - 1)))
                if not plan.round.expands(masses, buffers.key.batch, budget.cost):
                    return level, are_known
            if level < plan.num_levels:
                are_known &= self._run(buffers, level, partial(buffers.expand, level, batch))
        return plan.num_levels, are_known

    def _choose(
        self, buffers: RoundBuffers, plan: _Plan, num_levels: int, budget: Budget
    ) -> Proposal:
        choice = buffers.choice(plan.num_nodes)
        key = (plan.num_nodes, num_levels)
        self._run(buffers, key, lambda: buffers.choose(num_levels, choice))
        if plan.round is None:
            return choice.tree(plan.num_nodes)
        scores = choice.node_scores.numpy()[:, 1:]
        size = plan.round.size(scores, num_levels, budget.cost)
        known = scores[:, : size - 1].copy()  # the next round may overwrite them
        return _Offer(**vars(choice.tree(size)), scores=known, round=plan.round)

    def _run(self, buffers: RoundBuffers, step: Hashable, launch: Callable[[], None]) -> bool:
        """Run a step of ``buffers``; whether it had run before."""
        # A graph holds addresses of all of these; as part of its key they outlive it.
        return self._device.run((self, self._cache, buffers, step), launch)

    # --- sequences and buffers ----------------------------------------------------------------

    def _batch_of(self, states: Sequence[SequenceState], plan: _Plan) -> CacheBatch:
        """The draft caches, with pages for the pending pairs and the nodes that are expanded."""
        num_expanded = (plan.num_levels - 1) * plan.top_k
        drafts = [self._drafts[state] for state in states]
        for draft in drafts:
            rows = draft.cached.length + len(draft.pending) + num_expanded
            self._cache.reserve(draft.cached, rows)
        batch = self._batch.update([draft.cached for draft in drafts])
        self._reach(batch)
        return batch

    def _reach(self, batch: CacheBatch) -> None:
        """Make the rotary table as long as the pages; steps over a shorter one are stale."""
        self.layer.reserve(batch.num_positions)

    def _buffers(
        self, states: Sequence[SequenceState], batch: CacheBatch, plan: _Plan
    ) -> RoundBuffers:
        is_coupled = self.is_coupled and any(state.temperature > 0 for state in states)
        key = RoundKey(len(states), batch.block_table.shape[1], plan.top_k, is_coupled)
        buffers = self._rounds.get(key)
        if buffers is None:
            max_levels = min(MAX_LEVELS - 1, MAX_NODES // plan.top_k)
            buffers = self._rounds.put(key, RoundBuffers(key, self.layer, max_levels))
        return buffers

    def _absorb(self, state: SequenceState, keep: int) -> None:
        """Run pending pairs but the last ``keep``: they leave keys and values, nothing more."""
        draft = self._drafts[state]
        while (left := len(draft.pending) - keep) > 0:
            count, first = min(left, MAX_NODES), draft.cached.length + 1
            tokens = torch.tensor(state.token_ids[first : first + count], dtype=torch.int32)
            work = Activations.make(self.layer.padded, count, 0)
            self._cache.reserve(draft.cached, draft.cached.length + count)
            batch = CacheBatch(self._cache, [draft.cached])
            self._reach(batch)
            order = torch.arange(count, dtype=torch.int32)[None]
            num = torch.tensor([count], dtype=torch.int32)
            rows = Rows(order, batch.kv_len, torch.zeros_like(num), num, batch.block_table)
            self.layer.sample_features(tokens, None, draft.pending[:count], work)
            self.layer.append(0, rows, self._cache, work)
            batch.commit(order, num)
            draft.pending = draft.pending[count:]
