"""A small model of the same tokenizer drafts for a large one.

Their tables may be padded to different sizes: only ids that both have are proposed. A token that
the small model has no row for stands there as its last one, which costs a guess and no more.

It proposes a beam tree: at each depth the ``width`` continuations with the highest product of
probabilities (width 1 is a chain). These drafts are deterministic, so acceptance draws from the
target alone and a seed gives the same text as without drafting. With ``is_sampled`` it proposes a
chain drawn from its own law and hands over ``draft_probs``; acceptance is then by rejection with
residuals (Leviathan et al. 2023, Chen et al. 2023), which keeps the target's law but not the text
of a seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from specrt import ops
from specrt.cache import CacheBatch, CachedSequence, KVCache
from specrt.device import Device
from specrt.draft.base import Budget, DraftParams
from specrt.models.model import LlamaModel
from specrt.tree import MAX_NODES, ChainTrees, Settler, chain
from specrt.types import AcceptResult, DraftTree, Proposal, SequenceState


class _Shape(NamedTuple):
    depth: int
    width: int


class _Level(NamedTuple):
    """The nodes of one depth, K a sequence, in the order they take in the tree."""

    tokens: torch.Tensor
    """``[B, K]`` int64."""
    above: torch.Tensor
    """``[B, K]`` int64: the parent's place in the level above, ascending."""
    scores: torch.Tensor
    """``[B, K]`` float32, log-probability of the path from the root."""


class _GrowingTree:
    """The trees of a round, level by level; all have the same number of nodes.

    Args:
        roots: ``[B]`` int32.
        shape: how large they become.
        device: where they lie, and the roots.
    """

    def __init__(self, roots: torch.Tensor, shape: _Shape, device: Device) -> None:
        size = roots.shape[0]
        self._nodes = device.zeros(2, size, 1 + shape.depth * shape.width, dtype=torch.int32)
        self._nodes[0, :, 0] = roots
        self._counts = torch.ones_like(roots)
        self.num_nodes = self.width = 1
        """All nodes, and those of the last level."""

    def add(self, level: _Level) -> None:
        """The next level; no parent comes behind its children, for levels lie one by one."""
        first, above = self.num_nodes, self.num_nodes - self.width
        self.width = level.tokens.shape[1]
        self.num_nodes += self.width
        self._nodes[0, :, first : self.num_nodes] = level.tokens
        self._nodes[1, :, first : self.num_nodes] = above + level.above
        self._counts.fill_(self.num_nodes)

    def proposal(self) -> Proposal:
        """What has grown so far (views)."""
        tokens, parents = self._nodes[..., : self.num_nodes]
        return Proposal(tokens, parents, self._counts)


class SmallModelDrafter:
    """Drafts with a second, smaller model.

    With :class:`DraftParams` ``top_k`` is the width; what is left open is ``depth`` and ``width``.
    A tree has whole levels only, as many as ``total_tokens`` lets it have.

    Args:
        model: shares the target's tokenizer (checked by whoever loads both).
        depth: how many tokens ahead.
        width: nodes at each depth.
        is_sampled: draw a chain instead of taking the most likely tokens; needs width 1.
        vocab_size: V of the target; None: the model's own.

    Raises:
        ValueError: depth or width out of range, or a sampled tree wider than a chain.
    """

    taps: tuple[str, ...] = ()

    def __init__(
        self,
        model: LlamaModel,
        depth: int = 4,
        width: int = 1,
        is_sampled: bool = False,
        *,
        vocab_size: int | None = None,
    ) -> None:
        if depth < 1 or width < 1:
            raise ValueError(f"depth, width: expected at least 1, got {depth}, {width}")
        self._model = model
        # In launched rounds the last tokens are run again.
        self._cache = model.new_cache(num_again=MAX_NODES if model.device.is_gpu else 0)
        self._depth = depth
        self._width = width
        self._is_sampled = is_sampled
        own = model.config.vocab_size
        self._vocab_size = vocab_size or own
        self._num_shared = min(own, self._vocab_size)
        self._check_width("width", width)
        self._device = model.device
        self._settler = Settler(self._vocab_size, self._device)
        self._chains = ChainTrees(self._device)
        self._cached: dict[SequenceState, CachedSequence] = {}
        self._batch = CacheBatch(self._cache)

    @property
    def cache(self) -> KVCache:
        """Its keys and values."""
        return self._cache

    def check(self, params: DraftParams) -> None:
        """Whether it can draft trees so wide.

        Raises:
            ValueError: ``top_k`` is more than the shared vocabulary, or than 1 for sampled drafts.
        """
        if params.top_k is not None:
            self._check_width("top_k", params.top_k)

    def start(self, state: SequenceState) -> None:
        """Open an empty draft cache."""
        self._cached[state] = self._cache.open()

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """Keep pace with the target, piece by piece; nothing is read from it."""
        if self._reach(state) > 0:
            self._extend(state, min(start + MAX_NODES, len(state.token_ids) - 1))
            self._cache.keep(self._cached[state], state.cache_salt, state.token_ids)

    def num_known(self, state: SequenceState, most: int) -> int:
        """All: what its cache lacks it runs by itself."""
        return most

    def begin_at(self, state: SequenceState, count: int) -> None:
        """Take up what rows of these its cache has.

        Raises:
            MemoryError: there is no page for their end.
        """
        if self._reach(state) > 0:
            self._cache.take_up(self._cached[state], state.cache_salt, state.token_ids, count)

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """Catch up with the accepted tokens, then grow the tree depth by depth.

        A sequence that has outgrown this model's context proposes nothing.
        """
        rows = [row for row, state in enumerate(states) if self._reach(state) > 0]
        drafting = [states[row] for row in rows]
        shape = self._shape(drafting, budget)
        if shape.depth < 1:
            return chain(_roots(states)[:, None])
        proposal = self._grow(drafting, self._device.there(_roots(drafting)), shape)
        if len(rows) == len(states):
            return proposal
        return _spread(proposal, rows, self._device.there(_roots(states)))

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Tree rows were never committed: the next catch-up runs the accepted tokens."""

    def finish(self, state: SequenceState) -> None:
        """Free the sequence's pages."""
        cached = self._cached.get(state)
        if cached is not None:
            self._cache.keep(cached, state.cache_salt, state.token_ids, is_over=True)
            self._cache.close(cached)
            self._cached.pop(state)  # not before: interrupted, it is found again

    # --- sizes --------------------------------------------------------------------------------

    def _check_width(self, name: str, width: int) -> None:
        if self._is_sampled and width != 1:
            raise ValueError(f"{name}: expected 1 for sampled drafts, got {width}")
        if width > self._num_shared:
            raise ValueError(
                f"{name}: expected at most the shared vocabulary {self._num_shared}, got {width}"
            )

    def _reach(self, state: SequenceState) -> int:
        """How deep this model's context lets a tree be."""
        return self._model.config.max_positions - len(state.token_ids)

    def _shape(self, states: Sequence[SequenceState], budget: Budget) -> _Shape:
        params = budget.params
        room = min(budget.max_nodes, params.total_tokens or MAX_NODES, MAX_NODES) - 1
        if room < 1 or not states:
            return _Shape(0, 0)
        width = min(params.top_k or self._width, room)
        depth = self._depth if params.depth is None else params.depth
        # The bonus token takes the last place.
        most_left = max(state.num_left for state in states) - 1
        reach = min(self._reach(state) for state in states)
        return _Shape(min(depth, room // width, most_left, reach), width)

    # --- a round ------------------------------------------------------------------------------

    def _grow(
        self, states: Sequence[SequenceState], roots: torch.Tensor, shape: _Shape
    ) -> Proposal:
        batch = self._batch_of(states, shape)
        logits = self._catch_up(states, batch)
        tree, level = _GrowingTree(roots, shape, self._device), None
        laws = list[torch.Tensor]()
        for depth in range(1, shape.depth + 1):
            if self._is_sampled:
                laws.append(_laws(logits, states))
                level = self._drawn(laws[-1], states, depth)
            else:
                level = _best(logits, level, shape.width)
            tree.add(level)
            if depth < shape.depth:
                logits = self._expand(tree, roots, batch)
        # The root's row stands where the sequence goes on; now that nothing hangs below it, it is
        # part of the sequence.
        batch.move(torch.zeros_like(roots[:, None]), torch.ones_like(roots))
        batch.advance([1] * len(states))
        return replace(tree.proposal(), draft_probs=self._draft_probs(laws))

    def _batch_of(self, states: Sequence[SequenceState], shape: _Shape) -> CacheBatch:
        for state in states:
            known = len(state.token_ids)
            if self._cached[state].length == known:  # asked again behind the same root
                self.finish(state)
                self.start(state)
            if known - self._cached[state].length > MAX_NODES:  # it has not drafted for long
                self._extend(state, known - 1)
            self._cache.reserve(self._cached[state], known + (shape.depth - 1) * shape.width)
        return self._batch.update([self._cached[state] for state in states])

    def _extend(self, state: SequenceState, end: int) -> None:
        """Run the tokens before ``end`` that the draft cache lacks."""
        cached = self._cached[state]
        behind = self._known(state.token_ids[cached.length : end])
        if behind:
            self._cache.reserve(cached, end)
            for _ in self._model.extend(behind, CacheBatch(self._cache, [cached])):
                pass

    def _catch_up(self, states: Sequence[SequenceState], batch: CacheBatch) -> torch.Tensor:
        """Run the tokens the draft cache lacks; logits ``[B, 1, S]`` behind the last ones.

        All but the last are committed. That one is the root of the tree to come: node 0, as in the
        target's cache.
        """
        pending = [
            self._known(state.token_ids[cached.length :])
            for state, cached in zip(states, batch.sequences, strict=True)
        ]
        counts = [len(tokens) for tokens in pending]
        width = max(counts)
        rows = [[*known, *[0] * (width - len(known)), len(known)] for known in pending]
        staged = self._device.there(torch.tensor(rows, dtype=torch.int32))
        padded, num_nodes = staged[:, :width].contiguous(), staged[:, width].contiguous()
        tree = replace(self._chains.of(padded), num_nodes=num_nodes)
        logits = self._model.forward(tree, batch).logits
        batch.move(tree.depth, num_nodes - 1)  # a chain's node i has depth i
        batch.advance([count - 1 for count in counts])
        last = torch.stack([logits[row, count - 1] for row, count in enumerate(counts)])
        return last[:, None, : self._num_shared]

    def _expand(self, tree: _GrowingTree, roots: torch.Tensor, batch: CacheBatch) -> torch.Tensor:
        """Logits ``[B, K, S]`` behind the last level's nodes, of the S ids that are shared."""
        proposal, first = tree.proposal(), tree.num_nodes - tree.width
        whole = self._settler.settle(proposal, roots, proposal.num_nodes, tree.num_nodes)
        level = DraftTree(
            draft_tokens=whole.draft_tokens[:, first:],
            parents=whole.parents[:, first:],
            depth=whole.depth[:, first:],
            ancestors=whole.ancestors[:, first:],
            num_nodes=whole.num_nodes - first,
        )
        first_node = torch.full_like(whole.num_nodes, first)
        output = self._model.forward(level, batch, first_node=first_node)
        return output.logits[..., : self._num_shared]

    def _known(self, token_ids: list[int]) -> list[int]:
        """The tokens, the last of the model's own for those past it."""
        last = self._model.config.vocab_size - 1
        if last + 1 >= self._vocab_size:
            return token_ids
        return [min(token, last) for token in token_ids]

    def _draft_probs(self, laws: list[torch.Tensor]) -> torch.Tensor | None:
        if not laws:
            return None
        # The last node has no children; its row is never read.
        probs = torch.stack([*laws, torch.zeros_like(laws[0])], dim=1)
        return pad(probs, (0, self._vocab_size - self._num_shared))

    def _drawn(self, law: torch.Tensor, states: Sequence[SequenceState], depth: int) -> _Level:
        """One token for each sequence, drawn from ``law [B, S]`` by counter."""
        noise = [
            ops.gumbel_noise(
                state.seed, len(state.token_ids) + depth - 1, law.shape[-1], ops.Purpose.DRAFT
            )
            for state in states
        ]
        there = self._device.there(torch.stack(noise))
        tokens = (law.log() + there).argmax(dim=-1, keepdim=True)
        return _Level(tokens, torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.float))


def _roots(states: Sequence[SequenceState]) -> torch.Tensor:
    return torch.tensor([state.token_ids[-1] for state in states], dtype=torch.int32)


def _best(logits: torch.Tensor, above: _Level | None, width: int) -> _Level:
    """The ``width`` best children over all nodes of the level above."""
    scores = torch.log_softmax(logits, dim=-1)  # [B, K, S]
    if above is not None:
        scores = scores + above.scores[:, :, None]
    best = scores.flatten(1).topk(width, dim=-1)
    index, order = best.indices.sort(dim=-1)
    vocab = scores.shape[-1]
    return _Level(index % vocab, index // vocab, best.values.gather(-1, order))


def _laws(logits: torch.Tensor, states: Sequence[SequenceState]) -> torch.Tensor:
    """The law each sequence's next draft is drawn from, ``[B, S]``; one-hot where greedy."""
    rows = []
    for row, state in zip(logits[:, -1], states, strict=True):
        if state.temperature > 0:
            rows.append(torch.softmax(row / state.temperature, dim=-1))
        else:
            rows.append(torch.zeros_like(row).scatter_(0, row.argmax(dim=0, keepdim=True), 1.0))
    return torch.stack(rows)


def _spread(proposal: Proposal, rows: list[int], roots: torch.Tensor) -> Proposal:
    """``proposal`` as those rows of a larger batch, ``roots [B]``, whose other trees are the root
    alone."""

    def among_all(part: torch.Tensor) -> torch.Tensor:
        whole = part.new_zeros(len(roots), *part.shape[1:])
        for place, row in enumerate(rows):
            whole[row].copy_(part[place])
        return whole

    tokens, probs = among_all(proposal.draft_tokens), proposal.draft_probs
    tokens[:, 0] = roots
    return Proposal(
        tokens,
        among_all(proposal.parents),
        among_all(proposal.num_nodes).clamp(min=1),
        None if probs is None else among_all(probs),
    )
