"""Drafters, targets and caches that go wrong: nobody's text changes and no page is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

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
def test_a_drafter_that_raises_changes_nothing(
    model: LlamaModel, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Asked for one sequence, it is not asked for that one again; its neighbours draft on."""
    asked = [[1, 2], [3, 4], [5, 6], [7, 8]]
    drafter = Failing(method)
    engine = make_engine(model, drafter)
    results = engine.generate(asked, LONG)
    assert texts(results) == texts(make_engine(model).generate(asked, LONG))
    assert engine.cache.num_free_pages == engine.cache.num_pages > 0
    assert drafter._lookups == {} or method == "finish"
    is_told = "broken drafter" in caplog.text
    assert is_told is (method in ("start", "prefill", "finish"))
    assert caplog.text.count("goes on undrafted") == (method in ("start", "prefill"))


class Picky(PromptLookupDrafter):
    """Raises whenever it is asked for one certain prompt, alone or among others."""

    def propose(self, states, budget):  # type: ignore[no-untyped-def]
        if any(state.token_ids[0] == 5 for state in states):
            raise RuntimeError("not this one")
        return super().propose(states, budget)


def test_who_is_to_blame_is_found_out(model: LlamaModel, caplog: pytest.LogCaptureFixture) -> None:
    asked = [[n, 9] * 6 for n in (3, 4, 5, 6)]
    shape = DraftParams(depth=3)  # or what was measured decides whether anything is drafted
    results = make_engine(model, Picky()).generate(asked, LONG, shape)
    assert texts(results) == texts(make_engine(model).generate(asked, LONG))
    assert [result.stats.num_draft_tokens > 0 for result in results] == [True, True, False, True]
    assert caplog.text.count("goes on undrafted") == 1


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


def test_a_prompt_that_fails_on_its_way_fails_alone(
    model: LlamaModel, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the target's prefill; in that of a drafter with pages of its own it goes on undrafted."""
    expected = texts(make_engine(model).generate(prompts(4, VOCAB), LONG))
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
        results = engine.generate(prompts(4, VOCAB), LONG)
        monkeypatch.undo()
        errors = [result.error for result in results]
        assert errors.count(None) == (3 if failing is model else 4)
        if failing is model:
            assert errors[2] == "RuntimeError: no more"
        for result, tokens in zip(results, expected, strict=True):
            assert result.error or result.token_ids == tokens
        for cache in (engine.cache, drafter._cache):
            assert cache.num_free_pages == cache.num_pages > 0


def test_no_memory_for_a_further_prompt_makes_it_wait(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, times = make_engine(model), list[int]()
    reserve = KVCache.reserve

    def refuse(cache: KVCache, sequence: CachedSequence, num_tokens: int) -> None:
        times.append(num_tokens)
        if cache.num_held_pages >= 2 and len(sequence.pages) * cache.page_size < num_tokens:
            raise MemoryError("KV cache: no memory")
        reserve(cache, sequence, num_tokens)

    monkeypatch.setattr(KVCache, "reserve", refuse)
    results = engine.generate(prompts(4, VOCAB), LONG)
    assert engine.cache.num_free_pages == engine.cache.num_pages > 0
    monkeypatch.undo()
    expected = make_engine(model).generate(prompts(4, VOCAB), LONG)
    for result, right in zip(results, expected, strict=True):
        if len(right.token_ids) + len(right.prompt_token_ids) <= 128:
            assert result.token_ids == right.token_ids
        else:
            assert result.error == "KV cache: no memory"
