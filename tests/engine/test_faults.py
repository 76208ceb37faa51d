"""Drafters, targets and caches that go wrong: nobody's text changes and no page is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specrt.cache import CachedSequence, KVCache
from specrt.draft.base import DraftParams, EmptyDrafter
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.lab.recording_drafter import RecordingDrafter
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from tests.engine.support import RandomTreeDrafter, make_engine, make_model, prompts, texts

VOCAB = 97
LONG = SamplingParams(max_new_tokens=40, temperature=1.0, seed=11, ignore_eos=True)


# --- trees out of bounds ----------------------------------------------------------------------


class Oversized(RandomTreeDrafter):
    """Trees of 128 nodes, whatever the budget."""

    def propose(self, states, budget):  # type: ignore[no-untyped-def]
        budget.max_nodes = 128
        return super().propose(states, budget)


@pytest.mark.parametrize("max_nodes", [1, 2, 70])
def test_a_tree_is_cut_to_what_there_is_room_for(model: LlamaModel, max_nodes: int) -> None:
    asked = prompts(3, VOCAB)
    expected = texts(make_engine(model).generate(asked, LONG))
    answers = {tuple(p): answer for p, answer in zip(asked, expected, strict=True)}
    drafter = Oversized(answers, VOCAB, 128, hit_rate=0.9)
    results = make_engine(model, drafter, max_nodes=max_nodes).generate(asked, LONG)
    assert texts(results) == expected
    drafted = [result.stats.num_draft_tokens / result.stats.num_rounds for result in results]
    assert max(drafted) <= max_nodes - 1
    if max_nodes > 1:
        assert max(result.stats.tau for result in results) > 1.2
        assert max(drafted) > 0.9 * min(max_nodes - 1, 64)


@pytest.mark.parametrize("num_nodes", [[1, 0], [1, 4], [1, -1], [1], [1, 1, 1]])
def test_a_number_of_nodes_that_cannot_be(model: LlamaModel, num_nodes: list[int]) -> None:
    class Miscounting(EmptyDrafter):
        def propose(self, states, budget):  # type: ignore[no-untyped-def]
            tree = super().propose(states, budget)
            return replace(tree, num_nodes=torch.tensor(num_nodes, dtype=torch.int32))

    engine = make_engine(model, Miscounting())
    with pytest.raises(
        ValueError, match=r"Miscounting: num_nodes: expected 2 numbers in 1\.\.1, .* got \["
    ):
        engine.generate([[1, 2], [3]], LONG)
    assert engine.cache.num_free_pages == engine.cache.num_pages


@pytest.mark.parametrize("depth", [2**31 - 1, 300, -1, -(2**31)])
def test_depths_that_cannot_be_cost_no_memory(model: LlamaModel, depth: int) -> None:
    class Deep(RandomTreeDrafter):
        def propose(self, states, budget):  # type: ignore[no-untyped-def]
            tree = super().propose(states, budget)
            return replace(tree, depth=torch.full_like(tree.depth, depth))

    stats = make_engine(model, Deep({(1, 2): [5] * 40}, VOCAB, 9)).generate([1, 2], LONG).stats
    assert stats.num_rounds + stats.num_accepted_tokens == LONG.max_new_tokens
    assert len(stats.proposed_by_depth) <= 8


def test_shapes_out_of_a_drafters_range_are_refused_at_the_call(model: LlamaModel) -> None:
    class Shaped(EmptyDrafter):
        def check(self, params: DraftParams) -> None:
            if params.depth == 3:
                raise ValueError("depth: expected any but 3, got 3")

        def propose(self, states, budget):  # type: ignore[no-untyped-def]
            raise AssertionError("something ran")

    for drafter in (Shaped(), RecordingDrafter(Shaped())):  # type: ignore[arg-type]
        engine = make_engine(model, drafter)
        for call in (engine.generate, engine.stream):  # not when the first chunk is asked for
            with pytest.raises(ValueError, match="depth: expected any but 3"):
                call([1, 2], LONG, DraftParams(depth=3))


# --- what raises ------------------------------------------------------------------------------


class Failing(PromptLookupDrafter):
    """Raises in one of its methods, the third time."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self._method = method
        self._times = 0

    def _count(self, method: str) -> None:
        self._times += method == self._method
        if method == self._method and self._times == 3:
            raise RuntimeError("broken drafter")

    def start(self, state):  # type: ignore[no-untyped-def]
        self._count("start")
        super().start(state)

    def prefill(self, state, start, taps):  # type: ignore[no-untyped-def]
        self._count("prefill")

    def propose(self, states, budget):  # type: ignore[no-untyped-def]
        self._count("propose")
        return super().propose(states, budget)

    def observe(self, states, proposal, result, taps):  # type: ignore[no-untyped-def]
        self._count("observe")
        super().observe(states, proposal, result, taps)

    def finish(self, state):  # type: ignore[no-untyped-def]
        self._count("finish")
        super().finish(state)


@pytest.mark.parametrize("method", ["start", "prefill", "propose", "observe", "finish"])
def test_a_drafter_that_raises_loses_no_pages(model: LlamaModel, method: str) -> None:
    asked = [[1, 2], [3, 4], [5, 6], [7, 8]]
    engine = make_engine(model, Failing(method))
    with pytest.raises(RuntimeError, match="broken drafter"):
        engine.generate(asked, LONG)
    assert engine.cache.num_free_pages == engine.cache.num_pages > 0
    assert texts(engine.generate(asked, LONG)) == texts(make_engine(model).generate(asked, LONG))


def test_an_interrupt_while_a_sequence_leaves_loses_no_pages(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    close, closed = engine.cache.close, list[CachedSequence]()

    def interrupted(sequence: CachedSequence) -> None:
        closed.append(sequence)
        if len(closed) == 1:
            raise KeyboardInterrupt
        close(sequence)

    monkeypatch.setattr(engine.cache, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([1, 2], LONG)
    assert engine.cache.num_free_pages == engine.cache.num_pages > 0


def test_a_prompt_that_fails_on_its_way_loses_no_pages(
    model: LlamaModel, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the target's prefill, and in the one of a drafter that has pages of its own."""
    drafting = make_model(checkpoint)
    drafter = SmallModelDrafter(drafting, depth=3)
    for failing in (model, drafting):
        engine = make_engine(model, drafter)
        extend, lengths = failing.extend, list[int]()

        def failing_extend(ids, *args, **options):  # type: ignore[no-untyped-def]
            lengths.append(len(ids))  # noqa: B023 (used within the loop)
            if len(lengths) == 3:  # noqa: B023
                raise RuntimeError("no more")
            return extend(ids, *args, **options)  # noqa: B023

        monkeypatch.setattr(failing, "extend", failing_extend)
        with pytest.raises(RuntimeError, match="no more"):
            engine.generate(prompts(4, VOCAB), LONG)
        monkeypatch.undo()
        for cache in (engine.cache, drafter._cache):
            assert cache.num_free_pages == cache.num_pages > 0


def test_no_memory_for_the_third_prompt_loses_nothing(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, times = make_engine(model), list[int]()
    reserve = KVCache.reserve

    def refuse(cache: KVCache, sequence: CachedSequence, num_tokens: int) -> None:
        times.append(num_tokens)
        if len(times) == 3:
            raise MemoryError("KV cache: no memory")
        reserve(cache, sequence, num_tokens)

    monkeypatch.setattr(KVCache, "reserve", refuse)
    with pytest.raises(MemoryError, match="KV cache: no memory"):
        engine.generate(prompts(4, VOCAB), LONG)
    assert engine.cache.num_free_pages == engine.cache.num_pages > 0
    assert texts(engine.generate(prompts(4, VOCAB), LONG)) == texts(
        make_engine(model).generate(prompts(4, VOCAB), LONG)
    )
