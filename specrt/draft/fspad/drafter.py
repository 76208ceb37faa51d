"""FSPAD, EAGLE-2 and the ablations between them: one trained layer drafts a tree of tokens.

The drafter reads the target's final features. Each round it runs its layer over the newly accepted
pairs (feature f_t, token e_{t+1}), then level by level over the best ``top_k`` nodes, and keeps the
most probable nodes of all levels (arXiv 2408.15562, section 3; EAGLE-2, arXiv 2406.16858). Trees
are deterministic, so acceptance draws from the target alone.

A round is a handful of steps: one for the accepted pairs, one a level, one for the choice of nodes.
On the CPU they are captured, and drafting may stop at any level. On a GPU they are launches that
nobody waits for: the host says what it knows in one copy, sizes follow from earlier rounds, and
nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from specrt.cache import CacheBatch, KVCache
from specrt.device import Device, Mark
from specrt.draft.base import Budget, DraftParams
from specrt.draft.fspad.kept import Draft, kept_as
from specrt.draft.fspad.layer import DraftLayer, Rows
from specrt.draft.fspad.pairs import MAX_LEVELS, MAX_PAIRS, PairTable
from specrt.draft.fspad.round import Choice, RoundBuffers, RoundKey, num_candidates
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.controlled import ControlledPolicy
from specrt.draft.length.envelope import GPU_ENVELOPES, RankBelief
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
    """``[B, N - 1]``, of the drafted nodes; NaN where the host does not see them."""
    num_levels: int = field(kw_only=True)
    round: TreeRound = field(kw_only=True)
    marks: tuple[Mark, Mark, Mark] | None = field(kw_only=True)
    """Before the steps, behind the first and behind the last level's; None where one was new."""


class FspadDrafter:
    """Drafts with one trained layer over the target's features.

    Without :class:`DraftParams` it chooses depth and size by measured cost, and whether to draft at
    all; what is left open of given ones is EAGLE-2's (depth 6, top_k 10, 60 nodes).

    Args:
        layer: the layer and its weights.
        is_coupled: rank candidates with the noise the target will draw with, where the temperature
            is above 0. Moves trees, never tokens.
        control: how long to draft, in place of measured cost.
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
        self._cache = KVCache(layer.padded, layer.weights.dtype, device=self._device)
        self._drafts: dict[SequenceState, Draft] = {}
        self._measured = measured = _measured(self._device)
        self._policy: TreePolicy = measured
        if control is not None:
            self._policy = ControlledPolicy(control, measured=measured)
        self._pairs: dict[int, list[PairTable]] = {}  # by the number of sequences
        self._rounds: Recent[tuple[RoundKey, PairTable], RoundBuffers] = Recent(_MAX_ROUNDS)
        self._batch = CacheBatch(self._cache)

    @property
    def cache(self) -> KVCache:
        """Of its own keys and values."""
        return self._cache

    # --- the protocol -------------------------------------------------------------------------

    def check(self, params: DraftParams) -> None:
        """Whether the draft vocabulary and a round's buffers have room for such trees.

        Raises:
            ValueError: ``depth`` and ``top_k`` do not fit 128 draft nodes or the draft vocabulary.
        """
        self._shape(params)

    def start(self, state: SequenceState) -> None:
        """Open an empty draft cache."""
        if not self._drafts:
            self._measured.welcome(state.num_left)
        hidden, dtype = self.layer.config.layer.hidden_size, self.layer.activation_dtype
        self._drafts[state] = Draft(
            self._cache.open(), [self._device.empty(0, hidden, dtype=dtype)]
        )

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """Run the prompt's pairs but the last, whose output the first tree grows from."""
        self._drafts[state].add(taps[FINAL_TAP][0].clone())  # valid only now
        self._absorb(state, keep=1)
        self._cache.keep(self._drafts[state].cached, *kept_as(state))

    def num_known(self, state: SequenceState, most: int) -> int:
        """Those whose pairs the draft cache has; but not of all that are run, for the first tree
        grows from the last one's feature."""
        salt, tokens = kept_as(state)
        return self._cache.find(salt, tokens, min(most, len(tokens) - 1))[0]

    def begin_at(self, state: SequenceState, count: int) -> None:
        """Take these pairs up.

        Raises:
            MemoryError: there is no page for their end.
        """
        self._cache.take_up(self._drafts[state].cached, *kept_as(state), count)

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
        buffers = self._buffers(states, batch, plan.top_k, self._pairs_of(len(states)))
        marks = [self._device.mark()]
        is_known = self._extend(states, batch, buffers)
        marks.append(self._device.mark())
        num_levels, are_known = self._grow(plan, batch, buffers, budget)
        marks.append(self._device.mark())
        choice = self._choose(buffers, plan, num_levels)
        if plan.round is None:
            return choice.tree(plan.num_nodes)
        return self._offer(
            choice, plan.round, num_levels, budget, tuple(marks) if is_known and are_known else None
        )

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Keep the features of the accepted path, which the next tree grows from."""
        lengths, features = result.lengths, taps[FINAL_TAP]
        for row, state in enumerate(states):
            path = result.path[row, : max(0, lengths[row] + 1)]
            self._drafts[state].add(features[row].index_select(0, path))
        if isinstance(proposal, _Offer):
            self._learn(proposal, lengths, result.paths)

    def finish(self, state: SequenceState) -> None:
        """Free the sequence's pages."""
        draft = self._drafts.get(state)
        if draft is not None:
            self._cache.keep(draft.cached, *kept_as(state), is_over=True)
            self._cache.close(draft.cached)
            self._drafts.pop(state)  # not before: interrupted, it is found again

    def gain(self) -> float:
        """As :class:`specrt.draft.with_lookup.RatedDrafter` says."""
        return self._measured.gain()

    def pass_over(self) -> None:
        """As :class:`specrt.draft.with_lookup.RatedDrafter` says."""
        self._measured.pass_over()

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
            most = 1 + num_candidates(num_levels, top_k)
            return _Plan(top_k, num_levels, min(num_nodes, most), None)
        chosen = self._policy.begin()
        return None if chosen is None else _Plan(top_k, num_levels, num_nodes, chosen)

    def _extend(
        self, states: Sequence[SequenceState], batch: CacheBatch, buffers: RoundBuffers
    ) -> bool:
        drafts = [self._drafts[state] for state in states]
        most = buffers.stage(states, batch, [draft.pending for draft in drafts])
        is_known = self._run(buffers, -most, lambda: buffers.extend(most, self._cache))
        batch.move(buffers.pairs.path, buffers.pairs.num_pairs)
        batch.advance([len(draft.pending) for draft in drafts])
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
                masses.append(plan.round.mass(buffers.scores(level - 1), level - 1))
                if not plan.round.expands(masses, buffers.key.batch, budget.cost):
                    return level, are_known
            if level < plan.num_levels:
                are_known &= self._run(buffers, level, partial(buffers.expand, level, self._cache))
        return plan.num_levels, are_known

    def _choose(self, buffers: RoundBuffers, plan: _Plan, num_levels: int) -> Choice:
        choice = buffers.choice(plan.num_nodes)
        key = (plan.num_nodes, num_levels)
        self._run(buffers, key, lambda: buffers.choose(num_levels, choice))
        return choice

    def _offer(
        self,
        choice: Choice,
        chosen: TreeRound,
        num_levels: int,
        budget: Budget,
        marks: tuple[Mark, Mark, Mark] | None,
    ) -> _Offer:
        scores = self._device.glance(choice.node_scores)[:, 1:]
        size = chosen.size(scores, num_levels, budget.cost)
        return _Offer(
            **vars(choice.tree(size)),
            scores=scores[:, : size - 1].copy(),  # the next round may overwrite them
            num_levels=num_levels,
            round=chosen,
            marks=marks,
        )

    def _learn(self, offer: _Offer, lengths: Sequence[int], paths: npt.NDArray[np.int32]) -> None:
        """Of a round that has been read: what it took, and what came of it."""
        if offer.marks is not None:
            extend_ms, levels_ms = (
                self._device.ms_between(*pair) for pair in pairwise(offer.marks)
            )
            self._policy.observe_draft(extend_ms, levels_ms, offer.num_levels - 1)
        is_accepted = np.zeros(offer.scores.shape)
        for row, length in enumerate(lengths):
            is_accepted[row, paths[row, 1 : max(0, length) + 1] - 1] = 1.0
        offer.round.observe_outcome(offer.scores, is_accepted, offer.num_levels)

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
        self.layer.prepare(batch, plan.top_k)
        return batch

    def _buffers(
        self, states: Sequence[SequenceState], batch: CacheBatch, top_k: int, pairs: PairTable
    ) -> RoundBuffers:
        is_coupled = self.is_coupled and any(state.temperature > 0 for state in states)
        key = RoundKey(len(states), batch.block_table.shape[1], top_k, is_coupled)
        buffers = self._rounds.get((key, pairs))
        if buffers is None:
            max_levels = min(MAX_LEVELS - 1, MAX_NODES // top_k)
            made = RoundBuffers(key, self.layer, pairs, max_levels)
            buffers = self._rounds.put((key, pairs), made)
        return buffers

    def _pairs_of(self, size: int) -> PairTable:
        """Of a batch of so many sequences, and in nobody else's use."""
        tables = self._pairs.setdefault(size, [])
        found = next((table for table in tables if not self._is_taken(table)), None)
        if found is None:
            found = PairTable(size, self.layer)
            tables.append(found)
        return found

    def _is_taken(self, table: PairTable) -> bool:
        """Whether pairs wait in a table from one round to the next."""
        return False

    def _absorb(self, state: SequenceState, keep: int) -> None:
        """Run pending pairs but the last ``keep``: they leave keys and values, nothing more."""
        draft, there = self._drafts[state], self._device.there
        while (left := len(draft.pending) - keep) > 0:
            count, first = min(left, MAX_NODES), draft.cached.length + 1
            tokens = there(torch.tensor(state.token_ids[first : first + count], dtype=torch.int32))
            work = self.layer.activations(count, 0)
            self._cache.reserve(draft.cached, draft.cached.length + count)
            batch = CacheBatch(self._cache, [draft.cached])
            self.layer.prepare(batch, 1)
            order = there(torch.arange(count, dtype=torch.int32)[None])
            num = there(torch.tensor([count], dtype=torch.int32))
            rows = Rows(order, batch.kv_len, torch.zeros_like(num), num, batch.block_table)
            self.layer.sample_features(tokens, None, draft.pending[:count], work)
            self.layer.append(0, rows, self._cache, work)
            batch.move(order, num)
            batch.advance([count])
            draft.pending = draft.pending[count:]


def _measured(device: Device) -> MeasuredPolicy:
    """What is believed of trees: by their own scores where the host sees them in time."""
    return MeasuredPolicy(RankBelief(), GPU_ENVELOPES) if device.is_gpu else MeasuredPolicy()
