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
from typing import NamedTuple

import torch

from specrt.draft.base import Budget, DraftParams
from specrt.draft.length.costs import RoundCost
from specrt.tree import MAX_NODES, TreeBuilder, chain, stack
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
    rest: int = 0  # rounds left in which not even a look is taken


class _Shape(NamedTuple):
    depth: int
    num_continuations: int
    num_nodes: int


class _Guess(NamedTuple):
    """What a tree's outcome is written to."""

    match: int
    record: _Record
    """The sequence's own, of this match length."""
    num_proposed: int
    """Tokens of the longest continuation."""
    num_expected: float
    """Of these, that will be accepted."""


@dataclass(frozen=True, eq=False)
class Guesses(Proposal):
    """Trees of which some were found, and what is expected of them."""

    guesses: Sequence[_Guess | None] = ()
    """B of them; None where the outcome teaches nothing."""

    def gain(self, cost: RoundCost) -> float:
        """Tokens by time of a round that verifies them over plain decoding's, as expected."""
        batch, size = self.draft_tokens.shape
        tokens = batch + sum(guess.num_expected for guess in self.guesses if guess is not None)
        return tokens / batch * cost.relative(batch) / cost.relative(batch * size)


class PromptLookupDrafter:
    """Proposes what followed the same words before.

    With :class:`DraftParams` ``depth`` bounds a continuation and ``top_k`` their number; what is
    left open is ``max_depth``, ``num_continuations`` and as many nodes as these make.

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
        grown = [self._tree(state, budget, len(states)) for state in states]
        if all(len(tree) == 1 for tree, _ in grown):
            return chain(torch.tensor([tree.tokens for tree, _ in grown], dtype=torch.int32))
        proposal = stack([tree for tree, _ in grown])
        return Guesses(**vars(proposal), guesses=[guess for _, guess in grown])

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Record how far each match held."""
        guesses = proposal.guesses if isinstance(proposal, Guesses) else ()
        for guess, accepted in zip(guesses, result.lengths, strict=False):
            if guess is not None and accepted >= 0:
                self._learn(guess, accepted, guess.num_proposed)

    def compare(self, found: Guesses, result: AcceptResult) -> None:
        """Learn of trees that were not verified, from what the text went on with."""
        for row, (guess, length) in enumerate(zip(found.guesses, result.lengths, strict=True)):
            if guess is None or length < 0:
                continue
            said = result.tokens[row, : length + 1].tolist()
            agreed = _agreed(found, row, said)
            # Of a tree that holds to the end of what was said more is not known.
            num_judged = agreed if agreed == len(said) else guess.num_proposed
            self._learn(guess, agreed, num_judged)

    def finish(self, state: SequenceState) -> None:
        """Forget the sequence."""
        self._lookups.pop(state, None)

    def _learn(self, guess: _Guess, accepted: int, num_proposed: int) -> None:
        guess.record.update(accepted, num_proposed)
        self._overall.setdefault(guess.match, _Record()).update(accepted, num_proposed)

    def _tree(
        self, state: SequenceState, budget: Budget, num_sequences: int
    ) -> tuple[TreeBuilder, _Guess | None]:
        lookup, tokens = self._lookups[state], state.token_ids
        root, is_auto = TreeBuilder(tokens[-1]), budget.params == DraftParams()
        if is_auto and lookup.rest > 0:
            lookup.rest -= 1
            return root, None
        lookup.index.extend(tokens)
        match, starts = lookup.index.longest_match(tokens, self._min_ngram)
        shape = self._largest(budget, state.num_left)
        if match == 0 or shape.depth < 1:
            return root, None
        if not is_auto:
            return _grow(tokens, starts, shape)[0], None
        record = self._record(lookup, match)
        depth = _worthwhile_depth(record.rate, shape.depth, budget.cost, num_sequences)
        if depth == 0:
            record.forget()
            lookup.rest = _REST
            return root, None
        # The likeliest continuation has its full depth, the others what half as many nodes give.
        most = min(shape.num_nodes, _num_nodes(depth))
        tree, num_proposed = _grow(tokens, starts, _Shape(depth, shape.num_continuations, most))
        return tree, _Guess(match, record, num_proposed, _expected(record.rate, num_proposed))

    def _largest(self, budget: Budget, num_left: int = MAX_NODES + 1) -> _Shape:
        """What a tree may be; the bonus token takes the last place of ``num_left``."""
        params = budget.params
        depth = self._max_depth if params.depth is None else params.depth
        most = min(budget.max_nodes, params.total_tokens or MAX_NODES)
        return _Shape(
            min(depth, most - 1, num_left - 1), params.top_k or self._num_continuations, most
        )

    def _record(self, lookup: _Lookup, match: int) -> _Record:
        record = lookup.records.get(match)
        if record is None:
            known = self._overall.get(match)
            record = _Record() if known is None else _Record.expecting(known.rate)
            lookup.records[match] = record
        return record


def _grow(tokens: Sequence[int], starts: Sequence[int], shape: _Shape) -> tuple[TreeBuilder, int]:
    """The tree of the last ``starts``, and how long its longest continuation is."""
    tree, longest = TreeBuilder(tokens[-1]), 0
    for start in starts[: -shape.num_continuations - 1 : -1]:
        # A continuation that runs into the end of the text goes on as if it repeated.
        period = len(tokens) - start
        path = [tokens[start + i % period] for i in range(shape.depth)]
        longest = max(longest, tree.add_path(path, shape.num_nodes))
    return tree, longest


def _agreed(found: Proposal, row: int, said: Sequence[int]) -> int:
    """How many of the tokens ``said`` behind a tree's root follow a path of it."""
    size = int(found.num_nodes[row])
    tokens, parents = found.draft_tokens[row].tolist(), found.parents[row].tolist()
    children = {(parents[node], tokens[node]): node for node in range(1, size)}
    node, count = 0, 0
    for token in said:
        child = children.get((node, token))
        if child is None:
            break
        node, count = child, count + 1
    return count


def _expected(rate: float, num_tokens: int) -> float:
    """Of so many tokens in a row, each right with the chance ``rate`` if the one before is."""
    return sum(rate**depth for depth in range(1, num_tokens + 1))


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
