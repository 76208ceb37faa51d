"""A trained drafter with prompt lookup beside it: each round is the one's that promises more.

What a text repeats is found by looking it up, for nothing; what it says for the first time takes a
trained drafter. Before a round only the lookup's tree is known, so its promise is held against what
the other's rounds have brought of late, both in tokens by time as measured. Neither is given up for
good: what was looked up and passed over is held against what the text then said, and of the trained
drafter the more is hoped, the longer it was not asked. (SAM-Decoding, arXiv 2411.10666, has a fixed
length of the match decide instead.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from specrt.cache import KVCache
from specrt.draft.base import (
    Budget,
    CachingDrafter,
    Drafter,
    DraftParams,
    PrefixDrafter,
    ShapedDrafter,
)
from specrt.draft.prompt_lookup.drafter import Guesses, PromptLookupDrafter
from specrt.types import AcceptResult, Proposal, SequenceState


@runtime_checkable
class RatedDrafter(CachingDrafter, PrefixDrafter, ShapedDrafter, Drafter, Protocol):
    """A trained drafter that knows what its rounds bring. It may be passed over: a round that
    another has proposed it observes like one of the root alone."""

    def gain(self) -> float:
        """Tokens by time of its next round over plain decoding's, as far as is known; 1 while it
        rests. What is hoped for where that was long ago, or never tried, is its own to say."""

    def pass_over(self) -> None:
        """A round is another's."""


@dataclass(frozen=True, eq=False)
class _Preferred(Proposal):
    """The trained drafter's trees, and what was looked up and passed over for them."""

    trees: Proposal = field(kw_only=True)
    """As the trained drafter gave them."""
    found: Guesses = field(kw_only=True)


class WithLookup:
    """Proposes what ``lookup`` found where that promises more than ``trained`` has brought.

    One of the two proposes for all sequences of a batch. With :class:`DraftParams` nothing that was
    measured is used, and ``trained`` proposes alone.

    Args:
        trained: the drafter whose trees they are otherwise.
        lookup: what is asked first.
    """

    def __init__(self, trained: RatedDrafter, lookup: PromptLookupDrafter) -> None:
        self.taps = trained.taps
        self.trained, self._lookup = trained, lookup

    @property
    def cache(self) -> KVCache:
        """The trained drafter's."""
        return self.trained.cache

    def check(self, params: DraftParams) -> None:
        """As the trained drafter's."""
        self.trained.check(params)

    def start(self, state: SequenceState) -> None:
        """Both begin."""
        self.trained.start(state)
        self._lookup.start(state)

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """The trained drafter reads the prompt; the lookup has it in the state."""
        self.trained.prefill(state, start, taps)

    def num_known(self, state: SequenceState, most: int) -> int:
        """As the trained drafter's; the lookup needs nothing."""
        return self.trained.num_known(state, most)

    def begin_at(self, state: SequenceState, count: int) -> None:
        """As the trained drafter's."""
        self.trained.begin_at(state, count)

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """What was looked up, or the trained drafter's trees."""
        if budget.params != DraftParams():
            return self.trained.propose(states, budget)
        found = self._lookup.propose(states, budget)
        if not isinstance(found, Guesses):
            return self.trained.propose(states, budget)
        gain = found.gain(budget.cost)
        if gain > self.trained.gain():
            self.trained.pass_over()
            return found
        trees = self.trained.propose(states, budget)
        # It rests after all, and has kept nothing of its own in it.
        if gain > 1.0 and type(trees) is Proposal and trees.draft_tokens.shape[1] == 1:
            return found
        fields = trees.draft_tokens, trees.parents, trees.num_nodes, trees.draft_probs
        return _Preferred(*fields, trees=trees, found=found)

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Both are told; each learns from proposals of its own, and the lookup from the text."""
        own = proposal.trees if isinstance(proposal, _Preferred) else proposal
        self.trained.observe(states, own, result, taps)
        if isinstance(proposal, _Preferred):
            self._lookup.compare(proposal.found, result)
        else:
            self._lookup.observe(states, proposal, result, taps)

    def finish(self, state: SequenceState) -> None:
        """Both forget the sequence."""
        self._lookup.finish(state)
        self.trained.finish(state)
