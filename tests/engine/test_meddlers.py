"""Drafters that write to what they were handed, fail one group of several, or read what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from specrt.draft.base import DraftParams, EmptyDrafter
from specrt.engine.results import GenerationResult
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from specrt.types import Proposal
from tests.engine.support import make_engine, prompts

VOCAB, NODES = 97, 5
PARAMS = [
    SamplingParams(
        max_new_tokens=12,
        temperature=0.8 * (index % 2),
        repetition_penalty=1.1,
        seed=index,
        ignore_eos=True,
        logprobs=True,
    )
    for index in range(4)
]
SHAPES = [[None] * 4, [DraftParams(depth=1 + index % 2) for index in range(4)]]


class Scripted(EmptyDrafter):
    """Proposes what a function makes of well-formed tensors."""

    def __init__(self, make: Callable[..., Proposal] = Proposal) -> None:
        self._make = make

    def propose(self, states, budget):  # type: ignore[no-untyped-def]
        size = len(states)
        tokens = torch.arange(size * NODES, dtype=torch.int32).view(size, NODES)
        parents = torch.arange(-1, NODES - 1, dtype=torch.int32).repeat(size, 1)
        return self._make(tokens, parents, torch.full((size,), NODES, dtype=torch.int32))


def said(result: GenerationResult) -> tuple[object, ...]:
    return (
        result.error,
        result.prompt_token_ids,
        result.token_ids,
        result.text,
        result.logprobs,
        result.seed,
    )


@pytest.fixture(scope="module")
def expected(model: LlamaModel) -> list[tuple[object, ...]]:
    return [said(result) for result in make_engine(model).generate(prompts(4, VOCAB), PARAMS)]


def answers(
    model: LlamaModel, drafter: EmptyDrafter, shapes: list[DraftParams | None]
) -> list[tuple[object, ...]]:
    engine = make_engine(model, drafter)
    asked = zip(prompts(4, VOCAB), PARAMS, shapes, strict=True)
    handles = [engine.add(*one) for one in asked]
    results = {}
    while not engine.is_idle:
        results |= {c.handle: c.result for c in engine.step() if c.result is not None}
    return [said(results[handle]) for handle in handles]


def _laws_of_several_vocabularies(
    tokens: torch.Tensor, parents: torch.Tensor, num_nodes: torch.Tensor
) -> Proposal:
    """One token more for groups of an odd size."""
    vocab_size = VOCAB + len(tokens) % 2
    laws = torch.full((*tokens.shape, vocab_size), 1 / vocab_size)
    return Proposal(tokens, parents, num_nodes, laws)


def test_what_cannot_be_merged_is_the_drafters_fault(
    model: LlamaModel, expected: list[tuple[object, ...]]
) -> None:
    """Between groups as within one: the step goes on."""
    lazily_negated = Scripted(lambda t, p, n: Proposal(torch._neg_view(t), p, n))
    shapes = [DraftParams(depth=1 + index // 3) for index in range(4)]
    assert answers(model, lazily_negated, shapes) == expected
    greedy = [number for number, params in enumerate(PARAMS) if params.is_greedy]
    said_so = answers(model, Scripted(_laws_of_several_vocabularies), shapes)
    assert [said_so[number] for number in greedy] == [expected[number] for number in greedy]


@pytest.mark.parametrize("shapes", SHAPES, ids=["one shape", "several"])
def test_what_came_of_a_round_may_be_written_to(
    model: LlamaModel, expected: list[tuple[object, ...]], shapes: list[DraftParams | None]
) -> None:
    class Writing(Scripted):
        taps = ("layer.0", "final", "logits")

        def prefill(self, state, start, taps):  # type: ignore[no-untyped-def]
            for tap in taps.values():
                tap.fill_(torch.nan)

        def observe(self, states, proposal, result, taps):  # type: ignore[no-untyped-def]
            self.prefill(None, 0, taps)
            for tensor in (result.path, result.tokens, result.accept_length):
                tensor.fill_(-1)
            if result.logprobs is not None:
                result.logprobs.fill_(0)

    assert answers(model, Writing(), shapes) == expected


@pytest.mark.parametrize("shapes", SHAPES, ids=["one shape", "several"])
def test_what_a_drafter_sees_of_a_sequence_is_a_copy(
    model: LlamaModel, expected: list[tuple[object, ...]], shapes: list[DraftParams | None]
) -> None:
    class Writing(Scripted):
        def start(self, state):  # type: ignore[no-untyped-def]
            state.token_ids.append(3)
            state.prompt_len, state.max_len, state.seed, state.temperature = 0, 1, 9, 5.0
            state.sampling_row.fill_(-1)

        def propose(self, states, budget):  # type: ignore[no-untyped-def]
            proposal = super().propose(states, budget)
            for state in states:
                state.token_ids[-1] = 96
                del state.token_ids[:-1]
            states.clear()
            return proposal

        def finish(self, state):  # type: ignore[no-untyped-def]
            state.token_ids.clear()

    assert answers(model, Writing(), shapes) == expected


def test_taps_that_are_not_there_are_refused_at_the_start(model: LlamaModel) -> None:
    """And those that were asked for then stay what is read."""
    drafter = Scripted()
    for tap in ("layer.3", "layer.-1", "hidden.0", 1):
        drafter.taps = ("final", tap)  # type: ignore[assignment]
        with pytest.raises(ValueError, match=f"taps: expected 'final', .* got {tap!r}"):
            make_engine(model, drafter)
    drafter.taps = ("final", "logits", "layer.2")
    engine = make_engine(model, drafter)
    drafter.taps = ("layer.3",)
    assert engine.generate([1, 2], max_new_tokens=3).error is None
