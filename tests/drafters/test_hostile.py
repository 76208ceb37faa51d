"""Drafters that propose what cannot be: no text changes, no page is lost, no neighbour notices."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from specrt.draft.base import Budget, DraftParams
from specrt.models.model import LlamaModel
from specrt.tree import MAX_NODES
from specrt.types import AcceptResult, Proposal, SequenceState
from tests.drafters.hostile import (
    ASKED,
    GREEDY,
    SAMPLINGS,
    SEEDED,
    VOCAB,
    Answers,
    Fields,
    Hostile,
    Plain,
    check,
    told,
)
from tests.engine.support import RandomTreeDrafter, make_engine, make_model, texts

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaModel:
    return make_model(checkpoint)


@pytest.fixture(scope="module")
def plain(model: LlamaModel) -> Plain:
    """What is said undrafted."""
    return {
        name: texts(make_engine(model, max_batch=1).generate(ASKED, params))
        for name, params in SAMPLINGS.items()
    }


# --- what is said in the tensors ------------------------------------------------------------------


def fill(name: str, value: int, at: tuple[Any, ...] = (...,)) -> Callable[[Fields], None]:
    def spoil(fields: Fields) -> None:
        fields[name][at] = value

    return spoil


def shuffle(fields: Fields) -> None:
    """Parents anywhere."""
    generator = torch.Generator().manual_seed(int(fields["num_nodes"].sum()))
    for name in ("parents", "num_nodes"):
        shape = fields[name].shape
        fields[name] = torch.randint(-3, 20, shape, generator=generator, dtype=torch.int32)


def point_forward(fields: Fields) -> None:
    fields["parents"][:, 1:] = torch.arange(2, fields["parents"].shape[1] + 1)


def point_at_itself(fields: Fields) -> None:
    fields["parents"][:, 1:] = torch.arange(1, fields["parents"].shape[1])


VALUES: dict[str, Callable[[Fields], None]] = {
    "wrong root": fill("draft_tokens", 3, (..., 0)),
    "root out of the vocabulary": fill("draft_tokens", INT_MAX, (..., 0)),
    "root with a parent": fill("parents", 5, (..., 0)),
    "parents forward": point_forward,
    "parents at themselves": point_at_itself,
    "parents negative": fill("parents", -1),
    "parents far below": fill("parents", INT_MIN),
    "one parent far above": fill("parents", INT_MAX, (..., -1)),
    "parents and sizes anyhow": shuffle,
    "token -1": fill("draft_tokens", -1, (..., 2)),
    "token V": fill("draft_tokens", VOCAB, (..., 2)),
    "token 2^31 - 1": fill("draft_tokens", INT_MAX, (..., 1)),
    "tokens INT_MIN": fill("draft_tokens", INT_MIN),
    "siblings alike": fill("draft_tokens", 7),
    "no nodes": fill("num_nodes", 0),
    "fewer than none": fill("num_nodes", -1),
    "INT_MIN nodes": fill("num_nodes", INT_MIN),
    "INT_MAX nodes": fill("num_nodes", INT_MAX),
    "too many in one sequence": fill("num_nodes", INT_MAX, (-1,)),
    "none in one sequence": fill("num_nodes", 0, (0,)),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_cannot_be(model: LlamaModel, plain: Plain, kind: str) -> None:
    check(model, plain, lambda answers: Hostile(answers, VALUES[kind]))


def test_what_is_right_before_the_fault_counts(model: LlamaModel, plain: Plain) -> None:
    """Or these tests would pass with drafting switched off."""
    for kind in ("wrong root", "one parent far above", "INT_MAX nodes"):
        engine = make_engine(model, Hostile(told(plain, "greedy"), VALUES[kind]))
        taus = [result.stats.tau for result in engine.generate(ASKED, GREEDY)]
        assert max(taus) > 1.3, kind


@pytest.mark.parametrize("max_nodes", [1, 2, 40])
def test_one_sequence_takes_more_than_the_budget(
    model: LlamaModel, plain: Plain, max_nodes: int
) -> None:
    """The pages behind its own would be a neighbour's."""

    class Unequal(Hostile):
        def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
            tree = super().propose(states, budget)
            tree.num_nodes[1:] = tree.num_nodes[1:].clamp(max=2)
            return tree

    for name, params in SAMPLINGS.items():
        drafter = Unequal(told(plain, name), lambda fields: None, MAX_NODES)
        engine = make_engine(model, drafter, max_batch=4, max_nodes=max_nodes)
        assert texts(engine.generate(ASKED, params)) == plain[name]
        assert engine.cache.num_free_pages == engine.cache.num_pages


def test_the_same_tensors_refilled(model: LlamaModel, plain: Plain) -> None:
    """As static buffers of a GPU are; they are spoiled as soon as the outcome is known."""

    class Refilling(Hostile):
        def __init__(self, answers: Answers) -> None:
            super().__init__(answers, lambda fields: None)
            self._buffers = torch.zeros(2, 4, MAX_NODES, dtype=torch.int32)
            self._num_nodes = torch.zeros(4, dtype=torch.int32)

        def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
            tree, count = super().propose(states, budget), len(states)
            size = tree.draft_tokens.shape[1]
            self._buffers[0, :count, :size] = tree.draft_tokens
            self._buffers[1, :count, :size] = tree.parents
            self._num_nodes[:count] = tree.num_nodes
            return Proposal(*self._buffers[:, :count], self._num_nodes[:count])

        def observe(
            self,
            states: Sequence[SequenceState],
            proposal: Proposal,
            result: AcceptResult,
            taps: Mapping[str, torch.Tensor],
        ) -> None:
            self._buffers.fill_(-5)
            self._num_nodes.fill_(9)

    check(model, plain, Refilling)


# --- what the tensors are -------------------------------------------------------------------------


def swap(name: str, make: Callable[[torch.Tensor], object]) -> Callable[[Fields], None]:
    def spoil(fields: Fields) -> None:
        fields[name] = make(fields[name])  # type: ignore[assignment]

    return spoil


FORMS: dict[str, Callable[[torch.Tensor], object]] = {
    "int64": lambda t: t.long(),
    "float32": lambda t: t.float(),
    "bool": lambda t: t.bool(),
    "one dimension more": lambda t: t[..., None],
    "no dimension": lambda t: t.flatten()[0],
    "a sequence less": lambda t: t[1:],
    "a sequence more": lambda t: torch.cat([t, t[:1]]),
    "another device": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "a list": lambda t: t.tolist(),
    "nothing": lambda t: None,
}
SAME: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "every other": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "transposed": lambda t: t.t().contiguous().t() if t.ndim == 2 else t,
    "a slice": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "read-only memory": lambda t: torch.from_numpy(_read_only(t)),
}


def _read_only(tensor: torch.Tensor) -> Any:
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["draft_tokens", "parents", "num_nodes"])
def test_forms_that_cannot_be(
    model: LlamaModel,
    plain: Plain,
    name: str,
    form: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The sequence goes on undrafted, which is said once."""
    drafter = Hostile(told(plain, "greedy"), swap(name, FORMS[form]))
    engine = make_engine(model, drafter, max_batch=3)
    with caplog.at_level(logging.WARNING, logger="specrt"):
        assert texts(engine.generate(ASKED, GREEDY)) == plain["greedy"]
    assert engine.cache.num_free_pages == engine.cache.num_pages
    assert caplog.text.count("goes on undrafted") == len(ASKED)
    assert name in caplog.text


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("form", SAME)
def test_forms_that_can_be_read(model: LlamaModel, plain: Plain, form: str) -> None:
    for name in ("draft_tokens", "parents", "num_nodes"):
        drafter = Hostile(told(plain, "greedy"), swap(name, SAME[form]))
        results = make_engine(model, drafter, max_batch=3).generate(ASKED, GREEDY)
        assert texts(results) == plain["greedy"]
        assert max(result.stats.tau for result in results) > 1.3, name


@pytest.mark.parametrize("given", [None, 7, "tree", (1, 2, 3)])
def test_what_is_no_proposal(model: LlamaModel, plain: Plain, given: object) -> None:
    class Answering(Hostile):
        def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
            return given  # type: ignore[return-value]

    check(model, plain, lambda answers: Answering(answers, lambda fields: None))


def test_a_tree_without_columns(model: LlamaModel, plain: Plain) -> None:
    def narrow(fields: Fields) -> None:
        fields["draft_tokens"] = fields["draft_tokens"][:, :0]
        fields["parents"] = fields["parents"][:, :0]

    check(model, plain, lambda answers: Hostile(answers, narrow))


# --- laws -----------------------------------------------------------------------------------------


def laws(spoil: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Fields], None]:
    def add(fields: Fields) -> None:
        size = fields["draft_tokens"].shape
        fields["draft_probs"] = spoil(torch.full((*size, VOCAB), 1.0 / VOCAB))

    return add


def _at(probs: torch.Tensor, token: int) -> torch.Tensor:
    return torch.zeros_like(probs).index_fill(2, torch.tensor([token]), 1.0)


BROKEN_LAWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NaN": lambda p: p * float("nan"),
    "one NaN": lambda p: p.index_fill(2, torch.tensor([5]), float("nan")),
    "infinite": lambda p: p.index_fill(2, torch.tensor([5]), float("inf")),
    "negative": lambda p: p.index_fill(2, torch.tensor([5]), -0.5),
    "negative of sum 1": lambda p: p + 0.5 * (_at(p, 5) - _at(p, 6)),
    "of sum 2": lambda p: 2 * p,
    "zero": lambda p: 0 * p,
    "over fewer tokens": lambda p: p[..., :-1],
    "over more tokens": lambda p: torch.nn.functional.pad(p, (0, 3)),
    "half precision": lambda p: p.half(),
    "of fewer nodes": lambda p: p[:, :-1],
    "of a sequence less": lambda p: p[1:],
    "of another device": lambda p: p.to("meta"),
}


@pytest.mark.parametrize("kind", BROKEN_LAWS)
def test_laws_that_are_none(model: LlamaModel, plain: Plain, kind: str) -> None:
    check(model, plain, lambda answers: Hostile(answers, laws(BROKEN_LAWS[kind])))


def test_laws_that_are_some_are_used(model: LlamaModel, plain: Plain) -> None:
    drafter = Hostile(told(plain, "seeded"), laws(lambda p: p.requires_grad_()))
    results = make_engine(model, drafter, max_batch=3).generate(ASKED, SEEDED)
    assert all(len(tokens) == SEEDED.max_new_tokens for tokens in texts(results))
    assert max(result.stats.tau for result in results) > 1.05


def test_laws_of_one_sequence_alone(model: LlamaModel, plain: Plain) -> None:
    """Its neighbour's are none: it says what its seed says."""

    class Lawful(Hostile):
        def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
            tree = super().propose(states, budget)
            assert tree.draft_probs is not None
            for row, state in enumerate(states):
                if state.token_ids[: state.prompt_len] != ASKED[0]:
                    tree.draft_probs[row] = float("nan")
            return tree

    engine = make_engine(model, Lawful(told(plain, "seeded"), laws(lambda p: p)), max_batch=4)
    assert texts(engine.generate(ASKED, SEEDED))[1:] == plain["seeded"][1:]


# --- what raises ----------------------------------------------------------------------------------


class Raising(RandomTreeDrafter):
    """Raises in one of its methods, whenever it is about one certain prompt."""

    def __init__(self, answers: Answers, method: str, error: Exception) -> None:
        super().__init__(answers, VOCAB, 8, hit_rate=0.7)
        self._method, self._error = method, error

    def _count(self, method: str, *states: SequenceState) -> None:
        if method == self._method and any(self._is_ill_fated(state) for state in states):
            raise self._error

    def _is_ill_fated(self, state: SequenceState) -> bool:
        return state.token_ids[: state.prompt_len] == ASKED[1]

    def start(self, state: SequenceState) -> None:
        self._count("start", state)

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        self._count("prefill", state)

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        self._count("propose", *states)
        return super().propose(states, budget)

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        self._count("observe", *states)

    def finish(self, state: SequenceState) -> None:
        self._count("finish", state)


ERRORS = [RuntimeError("broken"), MemoryError("no room"), AssertionError(), KeyError(3)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", ["start", "prefill", "propose", "observe", "finish"])
def test_a_drafter_that_raises(
    model: LlamaModel,
    plain: Plain,
    method: str,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(model, Raising(told(plain, "greedy"), method, error), max_batch=3)
    with caplog.at_level(logging.WARNING, logger="specrt"):
        results = engine.generate(ASKED, GREEDY)
    assert texts(results) == plain["greedy"]
    assert engine.cache.num_free_pages == engine.cache.num_pages
    assert caplog.text.count(type(error).__name__) == 1  # said once
    assert caplog.text.count("goes on undrafted") == (method != "finish")
    # Its neighbours are drafted for as before.
    assert all(r.stats.num_accepted_tokens > 0 for r in (results[0], results[2], results[3]))
    # And so is the next one.
    again = engine.generate([ASKED[2]], GREEDY)
    assert texts(again) == plain["greedy"][2:3] and again[0].stats.num_accepted_tokens > 0


def test_the_shape_that_was_asked_for_does_not_bind_a_hostile_one(
    model: LlamaModel, plain: Plain
) -> None:
    drafter = Hostile(told(plain, "greedy"), lambda fields: None, 30)
    results = make_engine(model, drafter).generate(ASKED, GREEDY, DraftParams(total_tokens=4))
    assert texts(results) == plain["greedy"]
