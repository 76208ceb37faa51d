"""Token Recycling: what the target found likely behind a token drafts behind it.

Every verified row, accepted or not, says which tokens the target finds likely after the row's own.
They are kept, for each token those of the last time, and a tree is read off them level by level:
nothing is run to draft.

Of several rows of one token in one round, the last on the accepted path counts; where none was
accepted, the first in the tree. A sequence begins with what those that have ended knew and learns
by itself, so its drafts do not depend on its neighbours.

Source: Token Recycling (arXiv 2408.08696), which has one table, one static tree of 80 nodes, greedy
decoding and a batch of one. Ours: tables that are copied and merged, and trees of the size that
pays, by what was accepted and what rows cost, without nodes whose token is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from specrt.draft.base import Budget, DraftParams
from specrt.draft.length.measured import MeasuredPolicy
from specrt.draft.recycle.table import NextTokens, likeliest
from specrt.draft.recycle.template import Template, make_template
from specrt.models.step import LOGITS_TAP
from specrt.tree import MAX_NODES, chain
from specrt.types import AcceptResult, Proposal, SequenceState

_MAX_NODES = 64
_MAX_DEPTH = 12


@dataclass(frozen=True, eq=False)
class Recycled(Proposal):
    """A proposal, and what was thought of its nodes."""

    scores: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """``[B, M - 1]``: of the drafted nodes; -inf where a sequence has none."""


class RecycleDrafter:
    """Proposes what the target found likely behind the same tokens before.

    Args:
        vocab_size: V of the target.
    """

    taps: tuple[str, ...] = (LOGITS_TAP,)

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._known = NextTokens(vocab_size)
        self._tables: dict[SequenceState, NextTokens] = {}
        self._policy = MeasuredPolicy()

    def start(self, state: SequenceState) -> None:
        """Take a copy of what is known."""
        if not self._tables:
            self._policy.welcome(state.num_left)
        self._tables[state] = self._known.copy()

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """The prompt's rows have no logits."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """Read a tree of each sequence off its table."""
        started = perf_counter()
        roots = np.array([[state.token_ids[-1]] for state in states], dtype=np.int32)
        is_fixed = budget.params != DraftParams()
        if not is_fixed and not self._policy.begin():
            return chain(torch.from_numpy(roots))
        tree = self._grow(states, roots, template_of(budget))
        most = tree.draft_tokens.shape[1]
        if is_fixed or most == 1:
            return tree
        self._policy.observe_draft(1e3 * (perf_counter() - started), 0.0, 0)
        size = self._policy.size(tree.scores, 1, budget.cost)
        return _first(tree, size)

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Learn from every verified row, and how far the trees were right.

        Raises:
            ValueError: the logits are of another vocabulary.
        """
        logits = taps[LOGITS_TAP]
        check_logits(logits, self._vocab_size)
        size = min(logits.shape[1], proposal.draft_tokens.shape[1])
        is_accepted = accepted_nodes(result.paths, size)
        tokens = proposal.draft_tokens[:, :size].numpy()
        ids = likeliest(logits[:, :size].reshape(-1, self._vocab_size)).reshape(*tokens.shape, -1)
        num_nodes, lengths = proposal.num_nodes.tolist(), result.lengths
        for row, state in enumerate(states):
            if lengths[row] < 0:  # its logits were NaN
                continue
            is_on_path = is_accepted[row, : num_nodes[row]]
            order = np.concatenate([np.flatnonzero(~is_on_path)[::-1], np.flatnonzero(is_on_path)])
            self._tables[state].learn(tokens[row, order], ids[row, order])
        if isinstance(proposal, Recycled):
            self._policy.observe_outcome(proposal.scores[:, : size - 1], is_accepted[:, 1:], 1)

    def finish(self, state: SequenceState) -> None:
        """Forget the sequence, but not what it has learned."""
        table = self._tables.pop(state, None)
        if table is not None:
            self._known.merge(table)

    def _grow(
        self, states: Sequence[SequenceState], roots: npt.NDArray[np.int32], template: Template
    ) -> Recycled:
        """All nodes of the template whose tokens are known and that an output can reach."""
        tokens = np.full((len(states), len(template.parents)), -1, dtype=np.int32)
        tokens[:, :1] = roots
        for row, state in enumerate(states):
            table = self._tables[state]
            for level in template.levels[: max(0, state.num_left - 1)]:
                above = tokens[row, template.parents[level]]
                tokens[row, level] = table.behind(above, template.ranks[level])
        is_known = tokens >= 0
        num_nodes = is_known.sum(axis=1, dtype=np.int32)
        # Known nodes first; they keep their order, so parents stay before children.
        order = np.argsort(~is_known, axis=1, kind="stable")[:, : num_nodes.max()]
        places = is_known.cumsum(axis=1, dtype=np.int32) - 1
        parents = np.take_along_axis(places, template.parents[order], axis=1)
        parents[:, 0] = -1
        is_padding = np.arange(order.shape[1]) >= num_nodes[:, None]
        return Recycled(
            torch.from_numpy(np.take_along_axis(tokens, order, axis=1)),
            torch.from_numpy(parents),
            torch.from_numpy(num_nodes),
            scores=np.where(is_padding, np.float32(-np.inf), template.scores[order])[:, 1:],
        )


def check_logits(logits: torch.Tensor, vocab_size: int) -> None:
    """Whether they are a target's of so many tokens.

    Raises:
        ValueError: they are not.
    """
    if logits.shape[2] != vocab_size:
        raise ValueError(f"recycle: expected logits of {vocab_size} tokens, got {logits.shape[2]}")


def accepted_nodes(paths: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.bool_]:
    """``[B, size]``: which nodes are on the accepted ``paths [B, P]``."""
    is_accepted = np.zeros((len(paths), size), dtype=bool)
    rows, places = np.nonzero((paths >= 0) & (paths < size))
    is_accepted[rows, paths[rows, places]] = True
    return is_accepted


def template_of(budget: Budget, reach: int = MAX_NODES) -> Template:
    """The largest tree of a budget.

    Args:
        budget: of the round.
        reach: how deep a node may still be of use.
    """
    params = budget.params
    size = min(budget.max_nodes, params.total_tokens or _MAX_NODES)
    depth = _MAX_DEPTH if params.depth is None else params.depth
    return make_template(size, max(0, min(depth, reach)), params.top_k or MAX_NODES)


def _first(tree: Recycled, size: int) -> Recycled:
    """The first ``size`` nodes."""
    return Recycled(
        tree.draft_tokens[:, :size].contiguous(),
        tree.parents[:, :size].contiguous(),
        tree.num_nodes.clamp(max=size),
        scores=tree.scores[:, : size - 1],
    )
