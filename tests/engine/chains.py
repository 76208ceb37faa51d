"""Drafters of made-up chains: what they propose is a function of the prompt and the position."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from specrt.draft.base import Budget
from specrt.draft.length.control import ControlOptions, ControlRound, DraftControl
from specrt.draft.length.costs import DraftCosts
from specrt.tree import TreeBuilder, stack
from specrt.types import AcceptResult, Proposal, SequenceState

SLOPE = (0.8, 0.6)
COSTS = DraftCosts(fixed=0.2, step=0.3, lower=0.25, verify=2.0, row=0.1)


class Chain(NamedTuple):
    tokens: np.ndarray
    scores: np.ndarray
    evidence: np.ndarray


@dataclass(frozen=True, eq=False)
class ChainProposal(Proposal):
    chain: Chain | None = None
    control: ControlRound | None = None


class ChainDrafter:
    """Proposes chains of ``DraftParams.depth`` tokens, as far as an output can reach.

    Args:
        answers: for each prompt (as a tuple) what plain decoding says, and goes on to say.
        vocab_size: of the wrong tokens.
        max_draft: the chain's length where a call does not say.
    """

    taps: tuple[str, ...] = ()

    def __init__(
        self, answers: Mapping[tuple[int, ...], list[int]], vocab_size: int, max_draft: int
    ) -> None:
        self._answers = answers
        self._vocab_size = vocab_size
        self._max_draft = max_draft

    def costs(self, batch: int = 1) -> DraftCosts:
        return COSTS

    def start(self, state: SequenceState) -> None: ...

    def prefill(
        self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]
    ) -> None: ...

    def finish(self, state: SequenceState) -> None: ...

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None: ...

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        depth = budget.params.depth
        chains = self.chains(states, self._max_draft if depth is None else depth)
        lengths = [min(chains.tokens.shape[1], room(state)) for state in states]
        return self.trees(states, chains, lengths)

    def chains(self, states: Sequence[SequenceState], length: int) -> Chain:
        """A chain of each sequence, with scores that say a little of what is right."""
        rows = [[self._draft(state, step) for step in range(length)] for state in states]
        columns = [[[draft[part] for draft in row] for row in rows] for part in range(3)]
        return Chain(
            np.array(columns[0], dtype=np.int32),
            np.array(columns[1], dtype=np.float32),
            np.array(columns[2], dtype=np.float32),
        )

    def trees(
        self,
        states: Sequence[SequenceState],
        chains: Chain,
        lengths: Sequence[int],
        control: ControlRound | None = None,
    ) -> ChainProposal:
        builders = []
        for row, (state, length) in enumerate(zip(states, lengths, strict=True)):
            builder = TreeBuilder(state.token_ids[-1])
            builder.add_path(chains.tokens[row, :length].tolist(), 1 + length)
            builders.append(builder)
        made = stack(builders)
        fields = made.draft_tokens, made.parents, made.num_nodes
        return ChainProposal(*fields, chain=chains, control=control)

    def _draft(self, state: SequenceState, step: int) -> tuple[int, float, tuple[float, float]]:
        place = len(state.token_ids)
        prompt = tuple(state.token_ids[: state.prompt_len])
        rng = random.Random(f"{prompt} {place} {step}")
        chance = rng.choice([0.3, 0.7, 0.9, 0.98])
        right = (self._answers[prompt] + [0] * 100)[place - state.prompt_len + step]
        token = right if rng.random() < chance else rng.randrange(self._vocab_size)
        return token, float(np.log(chance)), (rng.gauss(0.5, 1.0), rng.gauss(-0.5, 1.0))


class ControlledDrafter(ChainDrafter):
    """Drafts the same chains as long as a controller wants them."""

    def __init__(
        self,
        answers: Mapping[tuple[int, ...], list[int]],
        vocab_size: int,
        options: ControlOptions,
    ) -> None:
        super().__init__(answers, vocab_size, options.max_draft)
        self.control = DraftControl(options)
        self.rounds: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        """By prompt: drafted and verified, round by round."""

    def start(self, state: SequenceState) -> None:
        self.control.start(state)
        self.rounds[tuple(state.token_ids)] = []

    def finish(self, state: SequenceState) -> None:
        self.control.finish(state)

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        chains, control = self.chains(states, self._max_draft), None
        drafted = lengths = [0] * len(states)
        if any(room(state) for state in states):
            control = self.control.new_round(len(states), torch.tensor(SLOPE))
            self._draft_all(control, states, chains)
            drafted, lengths = control.drafted.tolist(), control.length.tolist()
        for state, *counts in zip(states, drafted, lengths, strict=True):
            self.rounds[tuple(state.token_ids[: state.prompt_len])].append((counts[0], counts[1]))
        return self.trees(states, chains, lengths, control)

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        assert isinstance(proposal, ChainProposal)
        if proposal.control is not None:
            proposal.control.update(self.control, states, result.accept_length.tolist())

    def _draft_all(
        self, control: ControlRound, states: Sequence[SequenceState], chains: Chain
    ) -> None:
        control.stage(self.control, states, COSTS)
        control.decide(0, None, None)
        step = 0
        while control.is_open.any():
            scores, evidence = chains.scores[:, step], chains.evidence[:, step]
            step += 1
            score = torch.from_numpy(scores.copy())
            control.decide(step, score, torch.from_numpy(evidence.copy()))


def room(state: SequenceState) -> int:
    """Drafted tokens that the sequence has room for, the bonus token beside them."""
    return max(0, state.num_left - 1)
