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
from dataclasses import dataclass, replace

import torch

from specrt import ops
from specrt.cache import CacheBatch, CachedSequence
from specrt.draft.base import Budget
from specrt.models.model import LlamaModel
from specrt.tree import MAX_NODES, chain, chain_tree
from specrt.types import AcceptResult, DraftTree, Proposal, SequenceState

_WORD = 63  # nodes whose ancestor bits fit one int64 without touching its sign


@dataclass(eq=False)
class _Level:
    """The nodes of one depth, K a sequence, in the order they take in the tree."""

    tokens: torch.Tensor
    """``[B, K]`` int64."""
    parents: torch.Tensor
    """``[B, K]`` int64, node indices."""
    ancestors: torch.Tensor
    """``[B, K]`` int64 bits."""
    scores: torch.Tensor
    """``[B, K]`` float32, log-probability of the path from the root."""


class SmallModelDrafter:
    """Drafts with a second, smaller model.

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
        if is_sampled and width != 1:
            raise ValueError(f"width: expected 1 for sampled drafts, got {width}")
        self._model = model
        self._cache = model.new_cache()
        self._depth = depth
        self._width = width
        self._is_sampled = is_sampled
        own = model.config.vocab_size
        self._vocab_size = vocab_size or own
        self._num_shared = min(own, self._vocab_size)
        self._cached: dict[SequenceState, CachedSequence] = {}
        self._batch = CacheBatch(self._cache)

    def start(self, state: SequenceState) -> None:
        """Reserve pages in the draft cache and run the prompt but for its last token."""
        longest = min(state.max_len, self._model.config.max_positions)
        cached = self._cached[state] = self._cache.open(longest + MAX_NODES)
        batch = CacheBatch(self._cache, [cached])
        for _ in self._model.extend(self._known(state.token_ids[: longest - 1][:-1]), batch):
            pass

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """Nothing is read from the target."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """Catch up with the accepted tokens, then grow the tree depth by depth."""
        roots = torch.tensor([[state.token_ids[-1]] for state in states], dtype=torch.int32)
        depth = self._possible_depth(states, budget)
        if depth < 1:
            return chain(roots)
        batch = self._batch_of(states)
        logits = self._catch_up(states, batch)
        levels: list[_Level] = []
        laws: list[torch.Tensor] = []
        for level in range(1, depth + 1):
            above = levels[-1] if levels else None
            if self._is_sampled:
                laws.append(_laws(logits, states))
                levels.append(self._drawn(laws[-1], states, above, level))
            else:
                levels.append(self._best(logits, above, level))
            if level < depth:
                logits = self._expand(levels[-1], batch, level)
        return self._assemble(roots, levels, laws)

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
        cached = self._cached.pop(state, None)
        if cached is not None:
            self._cache.close(cached)

    def _possible_depth(self, states: Sequence[SequenceState], budget: Budget) -> int:
        room = min(budget.max_nodes - 1, _WORD - 1) // self._width
        longest = max(len(state.token_ids) for state in states)
        context = self._model.config.max_positions - longest
        most_left = max(state.num_left for state in states)
        return min(self._depth, room, context, most_left - 1)

    def _batch_of(self, states: Sequence[SequenceState]) -> CacheBatch:
        for state in states:
            cached = self._cached[state]
            behind = state.token_ids[cached.length :]
            if len(behind) > MAX_NODES:
                # A neighbour beyond this model's context has kept the whole batch from drafting.
                behind = self._known(behind[:-1])
                for _ in self._model.extend(behind, CacheBatch(self._cache, [cached])):
                    pass
        return self._batch.update([self._cached[state] for state in states])

    def _catch_up(self, states: Sequence[SequenceState], batch: CacheBatch) -> torch.Tensor:
        """Run the tokens the draft cache lacks; logits ``[B, 1, S]`` behind the last ones."""
        pending = [
            self._known(state.token_ids[cached.length :])
            for state, cached in zip(states, batch.sequences, strict=True)
        ]
        counts = torch.tensor([len(tokens) for tokens in pending], dtype=torch.int32)
        padded = torch.zeros(len(states), int(counts.max()), dtype=torch.int32)
        for row, tokens in enumerate(pending):
            padded[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        tree = replace(chain_tree(padded), num_nodes=counts)
        logits = self._model.forward(tree, batch).logits
        path = torch.arange(padded.shape[1], dtype=torch.int32)
        batch.commit(path.expand(len(states), -1).contiguous(), counts)
        return logits[torch.arange(len(states)), counts.long() - 1][:, None, : self._num_shared]

    def _best(self, logits: torch.Tensor, above: _Level | None, level: int) -> _Level:
        """The ``width`` best children over all nodes of the level above."""
        scores = torch.log_softmax(logits, dim=-1)  # [B, K, S]
        if above is not None:
            scores = scores + above.scores[:, :, None]
        size, num_parents, vocab = scores.shape
        best = scores.reshape(size, -1).topk(self._width, dim=-1)
        # Ascending parents keep every parent before its children, level by level.
        index, order = best.indices.sort(dim=-1)
        from_parent = index // vocab
        return self._level(
            index % vocab, from_parent, best.values.gather(-1, order), above, num_parents, level
        )

    def _drawn(
        self,
        law: torch.Tensor,
        states: Sequence[SequenceState],
        above: _Level | None,
        level: int,
    ) -> _Level:
        """One token for each sequence, drawn from ``law [B, S]`` by counter."""
        noise = torch.stack(
            [
                ops.gumbel_noise(
                    state.seed,
                    len(state.token_ids) + level - 1,
                    law.shape[-1],
                    ops.Purpose.DRAFT,
                )
                for state in states
            ]
        )
        tokens = (law.log() + noise).argmax(dim=-1, keepdim=True)
        nothing = torch.zeros(tokens.shape, dtype=torch.int64)
        return self._level(tokens, nothing, nothing.float(), above, 1, level)

    def _level(
        self,
        tokens: torch.Tensor,
        from_parent: torch.Tensor,
        scores: torch.Tensor,
        above: _Level | None,
        num_parents: int,
        level: int,
    ) -> _Level:
        first = 1 + (level - 1) * self._width
        own = torch.ones((), dtype=torch.int64) << torch.arange(first, first + self._width)
        if above is None:
            parents, bits = torch.zeros_like(tokens), own.expand_as(tokens) | 1
        else:
            parents = first - num_parents + from_parent
            bits = above.ancestors.gather(-1, from_parent) | own
        return _Level(tokens, parents, bits, scores)

    def _expand(self, level: _Level, batch: CacheBatch, depth: int) -> torch.Tensor:
        """Logits ``[B, K, S]`` behind a level's nodes, of the S ids that are shared.

        The root is committed in the draft cache, so its tree is one node ahead of the target's:
        node i there is node i - 1 here, and depths count from the first level.
        """
        size, width = level.tokens.shape
        first = torch.full((size,), (depth - 1) * self._width, dtype=torch.int32)
        tree = DraftTree(
            draft_tokens=level.tokens.int(),
            parents=level.parents.int() - 1,
            depth=torch.full((size, width), depth - 1, dtype=torch.int32),
            ancestors=(level.ancestors >> 1)[:, :, None],
            num_nodes=torch.full((size,), width, dtype=torch.int32),
        )
        return self._model.forward(tree, batch, first_node=first).logits[..., : self._num_shared]

    def _known(self, token_ids: list[int]) -> list[int]:
        """The tokens, the last of the model's own for those past it."""
        last = self._model.config.vocab_size - 1
        if last + 1 >= self._vocab_size:
            return token_ids
        return [min(token, last) for token in token_ids]

    def _assemble(
        self, roots: torch.Tensor, levels: list[_Level], laws: list[torch.Tensor]
    ) -> Proposal:
        size = roots.shape[0]
        one = torch.ones(size, 1, dtype=torch.int64)
        tokens = torch.cat([roots, *(level.tokens.int() for level in levels)], dim=1)
        parents = torch.cat([-one.int(), *(level.parents.int() for level in levels)], dim=1)
        draft_probs = None
        if laws:
            # The last node has no children; its row is never read.
            draft_probs = torch.stack([*laws, torch.zeros_like(laws[0])], dim=1)
            missing = self._vocab_size - self._num_shared
            draft_probs = torch.nn.functional.pad(draft_probs, (0, missing))
        num_nodes = torch.full((size,), tokens.shape[1], dtype=torch.int32)
        return Proposal(tokens, parents, num_nodes, draft_probs)


def _laws(logits: torch.Tensor, states: Sequence[SequenceState]) -> torch.Tensor:
    """The law each sequence's next draft is drawn from, ``[B, S]``; one-hot where greedy."""
    rows = []
    for row, state in zip(logits[:, -1], states, strict=True):
        if state.temperature > 0:
            rows.append(torch.softmax(row / state.temperature, dim=-1))
        else:
            rows.append(torch.nn.functional.one_hot(row.argmax(), row.shape[-1]).float())
    return torch.stack(rows)
