"""Prompt lookup: the text so far is the drafter.

The longest suffix that occurred before is looked up in prompt and output; what followed it there is
proposed, several continuations as one tree. It backs off by value: each match length keeps its
own record of how much was accepted, and a tree is proposed only while that is worth the rows it
costs.

Source: n-gram lookup as in transformers' ``prompt_lookup_num_tokens`` (A. Saxena, 2023); the tree
of continuations and the backing off are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from specrt.draft.base import Budget
from specrt.draft.length.costs import RoundCost
from specrt.tree import TreeBuilder, chain, stack
from specrt.types import AcceptResult, Proposal, SequenceState

_PRIOR_RATE = 0.5
_PRIOR_WEIGHT = 2.0
_DECAY = 0.9
_REST = 3  # looking up costs some per cent of a fast model's round: not every round, if in vain
_DRIFT = 0.02  # so that what failed is tried again after some hundred rounds


@dataclass(eq=False)
class _Index:
    """Where each n-gram of one sequence was seen, for n from 1 to ``max_ngram``."""

    max_ngram: int
    positions: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    num_indexed: int = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Index the n-grams that end before the last token (which has no continuation yet)."""
        for end in range(self.num_indexed + 1, len(tokens)):
            for size in range(1, min(self.max_ngram, end) + 1):
                self.positions.setdefault(tuple(tokens[end - size : end]), []).append(end)
            self.num_indexed = end

    def longest_match(self, tokens: Sequence[int], min_ngram: int) -> tuple[int, list[int]]:
        """Length of the longest known suffix and where its continuations start; 0 if none."""
        for size in range(min(self.max_ngram, len(tokens)), min_ngram - 1, -1):
            found = self.positions.get(tuple(tokens[-size:]))
            if found:
                return size, found
        return 0, []


@dataclass(eq=False)
class _Record:
    """How far matches of one length were accepted: chance that one more token is right."""

    num_accepted: float = _PRIOR_RATE * _PRIOR_WEIGHT
    num_judged: float = _PRIOR_WEIGHT

    @classmethod
    def expecting(cls, rate: float) -> _Record:
        """A record that has seen little, and expects ``rate``."""
        return cls(rate * _PRIOR_WEIGHT, _PRIOR_WEIGHT)

    @property
    def rate(self) -> float:
        return self.num_accepted / self.num_judged

    def update(self, accepted: int, proposed: int) -> None:
        # Tokens behind the first rejected one were not judged.
        judged = min(accepted + 1, proposed)
        self.num_accepted = _DECAY * self.num_accepted + accepted
        self.num_judged = _DECAY * self.num_judged + judged

    def forget(self) -> None:
        """Drift back to the prior while nothing is tried, so that lookup is tried again."""
        self.num_accepted += _DRIFT * (_PRIOR_RATE * _PRIOR_WEIGHT - self.num_accepted)
        self.num_judged += _DRIFT * (_PRIOR_WEIGHT - self.num_judged)


@dataclass(eq=False)
class _Lookup:
    index: _Index
    records: dict[int, _Record] = field(default_factory=dict)
    match: int = 0
    proposed: int = 0
    rest: int = 0  # rounds left in which not even a look is taken


class PromptLookupDrafter:
    """Proposes what followed the same words before.

    Args:
        max_ngram: longest suffix looked up.
        min_ngram: shortest suffix looked up.
        max_depth: longest continuation proposed.
        num_continuations: how many earlier occurrences may become branches.
    """

    taps: tuple[str, ...] = ()

    def __init__(
        self,
        max_ngram: int = 4,
        min_ngram: int = 1,
        max_depth: int = 15,
        num_continuations: int = 3,
    ) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"min_ngram: expected 1..max_ngram = {max_ngram}, got {min_ngram}")
        if max_depth < 1 or num_continuations < 1:
            raise ValueError("max_depth and num_continuations: expected at least 1")
        self._max_ngram = max_ngram
        self._min_ngram = min_ngram
        self._max_depth = max_depth
        self._num_continuations = num_continuations
        self._lookups: dict[SequenceState, _Lookup] = {}
        # Over all sequences: what a new sequence's matches of each length may expect.
        self._overall: dict[int, _Record] = {}

    def start(self, state: SequenceState) -> None:
        """Begin an index of the sequence's n-grams."""
        self._lookups[state] = _Lookup(_Index(self._max_ngram))

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """The prompt is in the state; nothing is read from the target."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """Continuations of the longest match, most recent first, merged where they agree."""
        trees = [self._tree(state, budget, len(states)) for state in states]
        if not any(self._lookups[state].proposed for state in states):
            roots = [[state.token_ids[-1]] for state in states]
            return chain(torch.tensor(roots, dtype=torch.int32))
        return stack(trees)

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Record how far each match held."""
        for state, accepted in zip(states, result.accept_length.tolist(), strict=True):
            lookup = self._lookups[state]
            if lookup.proposed and accepted >= 0:
                lookup.records[lookup.match].update(accepted, lookup.proposed)
                overall = self._overall.setdefault(lookup.match, _Record())
                overall.update(accepted, lookup.proposed)

    def finish(self, state: SequenceState) -> None:
        """Forget the sequence."""
        self._lookups.pop(state, None)

    def _tree(self, state: SequenceState, budget: Budget, num_sequences: int) -> TreeBuilder:
        lookup, tokens = self._lookups[state], state.token_ids
        lookup.match = lookup.proposed = 0
        if lookup.rest > 0:
            lookup.rest -= 1
            return TreeBuilder(tokens[-1])
        lookup.index.extend(tokens)
        match, positions = lookup.index.longest_match(tokens, self._min_ngram)
        lookup.match = match
        tree = TreeBuilder(tokens[-1])
        limit = min(budget.max_nodes - 1, self._max_depth, state.num_left - 1)
        if match == 0 or limit < 1:
            return tree
        record = lookup.records.get(match)
        if record is None:
            known = self._overall.get(match)
            record = _Record() if known is None else _Record.expecting(known.rate)
            lookup.records[match] = record
        depth = _worthwhile_depth(record.rate, limit, budget.cost, num_sequences)
        if depth == 0:
            record.forget()
            lookup.rest = _REST
            return tree
        # The likeliest continuation has its full depth, the others what half as many nodes give.
        max_nodes = min(budget.max_nodes, _num_nodes(depth))
        for start in positions[: -self._num_continuations - 1 : -1]:
            # A continuation that runs into the end of the text goes on as if it repeated.
            period = len(tokens) - start
            added = tree.add_path([tokens[start + i % period] for i in range(depth)], max_nodes)
            lookup.proposed = max(lookup.proposed, added)
        return tree


def _num_nodes(depth: int) -> int:
    return 1 + depth + depth // 2


def _worthwhile_depth(rate: float, limit: int, cost: RoundCost, num_sequences: int) -> int:
    """How many drafted nodes give the most expected tokens per unit of time; 0: none pays."""
    plain = cost.relative(num_sequences)
    best_depth, best_value = 0, 1.0
    expected, chance = 1.0, 1.0
    for depth in range(1, limit + 1):
        chance *= rate
        # Not even all that deeper drafts could bring would pay for this one's rows.
        price = cost.relative(_num_nodes(depth) * num_sequences) / plain
        if rate < 1.0 and (expected + chance / (1.0 - rate)) / price <= best_value:
            break
        expected += chance
        if expected / price > best_value:
            best_depth, best_value = depth, expected / price
    return best_depth
