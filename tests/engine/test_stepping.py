"""add, step, abort: what they promise, and that everybody shares one batch."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection
from threading import Barrier
from typing import Any

import pytest

from specrt.draft.base import EmptyDrafter
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from specrt.types import QueueFullError, RequestHandle
from tests.engine.support import make_engine, prompts, texts

VOCAB = 97
LONG = SamplingParams(max_new_tokens=24, temperature=1.0, seed=11, ignore_eos=True)


class Watching(EmptyDrafter):
    """Keeps what it is called for, in order: ``("prefill", n)`` and ``("round", batch)``."""

    taps = ("final",)

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def prefill(self, state, start, taps):  # type: ignore[no-untyped-def]
        self.events.append(("prefill", taps["final"].shape[1]))

    def propose(self, states, budget):  # type: ignore[no-untyped-def]
        self.events.append(("round", len(states)))
        return super().propose(states, budget)

    @property
    def batches(self) -> list[int]:
        """Sequences in each round."""
        return [count for name, count in self.events if name == "round"]


def run_all(engine: Engine) -> dict[RequestHandle, GenerationResult]:
    results = {}
    while not engine.is_idle:
        for chunk in engine.step():
            if chunk.result is not None:
                results[chunk.handle] = chunk.result
    return results


def alone(model: LlamaModel, prompt: list[int], params: SamplingParams = LONG) -> list[int]:
    return make_engine(model, max_batch=1).generate(prompt, params).token_ids


# --- add and step -----------------------------------------------------------------------------


def test_requests_join_while_others_run(model: LlamaModel) -> None:
    engine, asked = make_engine(model), prompts(5, VOCAB)
    assert engine.is_idle and engine.step() == []
    handles, results = [], {}
    for prompt in asked:
        handles.append(engine.add(prompt, LONG))
        for chunk in engine.step():
            assert chunk.result is None and chunk.handle in handles
    assert not engine.is_idle
    results = run_all(engine)
    assert [results[h].token_ids for h in handles] == [alone(model, p) for p in asked]
    assert engine.cache.num_held_pages == 0


def test_add_takes_one_prompt(model: LlamaModel) -> None:
    engine = make_engine(model)
    with pytest.raises(ValueError, match="^prompt: expected one, got a list of them; add each$"):
        engine.add([[1, 2], [3]], LONG)  # type: ignore[arg-type]
    assert engine.is_idle


def test_a_closed_engine_is_not_stepped(model: LlamaModel) -> None:
    engine = make_engine(model)
    handle = engine.add([1, 2], LONG)
    engine.step()
    engine.close()
    calls: tuple[Callable[[], object], ...] = (
        engine.step,
        lambda: engine.add([1, 2], LONG),
        lambda: engine.abort(handle),
        lambda: engine.is_idle,
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="^engine: expected an open one, got .* closed$"):
            call()


def test_a_full_queue_loses_nothing(model: LlamaModel) -> None:
    asked = prompts(7, VOCAB)
    engine = make_engine(model, max_batch=2, max_waiting=2)
    handles = [engine.add(prompt, LONG) for prompt in asked[:2]]
    with pytest.raises(QueueFullError, match="^max_waiting: expected fewer than 2 waiting"):
        engine.add(asked[2], LONG)
    engine.step()
    handles += [engine.add(prompt, LONG) for prompt in asked[2:4]]
    # A call's further prompts wait with it, among those that were added.
    assert texts(engine.generate(asked, LONG)) == [alone(model, prompt) for prompt in asked]
    results = run_all(engine)
    assert [results[h].token_ids for h in handles] == [alone(model, p) for p in asked[:4]]


# --- abort ------------------------------------------------------------------------------------


def test_abort_of_one_that_runs_that_waits_and_that_is_being_read(model: LlamaModel) -> None:
    engine = make_engine(model, max_batch=2, prefill_chunk=10)
    running = engine.add([1, 2], LONG)
    shown = [token for _ in range(3) for chunk in engine.step() for token in chunk.token_ids]
    being_read = engine.add([5] * 100, LONG)
    waiting, spared = engine.add([7, 8], LONG), engine.add([9, 10], LONG)
    shown += [token for chunk in engine.step() for token in chunk.token_ids]
    assert engine.cache.num_held_pages == 2
    for handle in (running, being_read, waiting):
        assert engine.abort(handle)
        assert not engine.abort(handle), "it has ended"
    assert engine.cache.num_held_pages == 0
    results = run_all(engine)
    assert [results[h].finish_reason for h in (running, being_read, waiting)] == ["abort"] * 3
    assert results[running].token_ids == shown == alone(model, [1, 2])[: len(shown)]
    assert results[running].error is None and len(shown) == 4
    assert results[waiting].token_ids == results[being_read].token_ids == []
    assert results[spared].token_ids == alone(model, [9, 10])
    assert not engine.abort(spared)


def test_abort_of_a_foreign_handle(model: LlamaModel) -> None:
    engine, other = make_engine(model), make_engine(model)
    foreign: tuple[Any, ...] = (other.add([1], LONG), None, 0)
    engine.add([1], LONG)
    for handle in foreign:
        with pytest.raises(ValueError, match="^handle: expected one that this engine's add gave"):
            engine.abort(handle)
    assert len(run_all(engine)) == len(run_all(other)) == 1


def test_abort_from_inside_a_round(model: LlamaModel) -> None:
    """It ends with that round, whose token is the last that is told."""

    class Aborting(EmptyDrafter):
        def observe(self, states, proposal, result, taps):  # type: ignore[no-untyped-def]
            if not engine.abort(handle):
                raise AssertionError("it had ended")

    engine = make_engine(model, Aborting())
    handle = engine.add([1, 2], LONG)
    results = run_all(engine)
    assert results[handle].finish_reason == "abort"
    assert results[handle].token_ids == alone(model, [1, 2])[:1]


# --- pages ------------------------------------------------------------------------------------


def test_pages_are_taken_as_they_are_needed(model: LlamaModel) -> None:
    """Not for the longest answer there may be."""
    engine = make_engine(model, max_batch=8)
    for prompt in range(8):
        engine.add([prompt] * 4, replace(LONG, max_new_tokens=400))
    for _ in range(5):
        engine.step()
    assert engine.cache.num_held_pages == 8


def test_growing_sequences_seldom_drop_captured_steps(model: LlamaModel) -> None:
    engine = make_engine(model, max_batch=5)
    params = replace(LONG, max_new_tokens=440)
    before = model.device.version
    engine.generate([[n] * (10 * n) for n in range(1, 6)], params)
    assert engine.cache.num_pages >= 32
    # The cache doubles, and so do the rotary table and the rows of the workspace.
    assert 1 <= model.device.version - before <= 8


def test_unequal_lengths_drop_no_captured_steps(model: LlamaModel) -> None:
    engine = make_engine(model, max_batch=4, max_shared_tokens=0)  # or pages become more
    asked = prompts(9, VOCAB)
    params = [replace(LONG, max_new_tokens=3 * number + 1) for number in range(9)]
    first = texts(engine.generate(asked, params))
    before = model.device.version
    handles = []
    for prompt, one in zip(asked, params, strict=True):
        handles.append(engine.add(prompt, one))
        engine.step()
    results = run_all(engine)
    assert texts(engine.generate(asked[::-1], params[::-1])) == first[::-1]
    assert all(handle in results or len(first[i]) < 9 for i, handle in enumerate(handles))
    assert model.device.version == before


def test_more_than_the_cache_may_ever_hold_is_refused_at_once(model: LlamaModel) -> None:
    engine = make_engine(model, max_cached_tokens=128)
    with pytest.raises(
        ValueError, match="^prompt: 128 tokens leave no room in the engine's max_cached_tokens, 128"
    ):
        engine.add([1] * 128, LONG)
    assert engine.is_idle


def test_who_outgrows_the_cache_alone_is_told_so(model: LlamaModel) -> None:
    engine = make_engine(model, max_cached_tokens=128)
    params = replace(LONG, max_new_tokens=200)
    expected = alone(model, [1, 2, 3], params)
    first, second = engine.generate([[1, 2, 3], [4]], [params, LONG])
    assert first.finish_reason == "error"
    assert first.error == (
        "KV cache: no memory for 3 pages of 64 tokens, "
        f"{3 * engine.cache.page_bytes / 2**20:.0f} MiB: max_pages is 2"
    )
    assert 100 < len(first.token_ids) <= 128
    assert first.token_ids == expected[: len(first.token_ids)]
    assert second.token_ids == alone(model, [4])
    assert engine.cache.num_held_pages == 0


# --- who waits for whom -----------------------------------------------------------------------


def test_nobody_waits_for_more_than_a_chunk_of_anothers_prompt(model: LlamaModel) -> None:
    drafter = Watching()
    engine = make_engine(model, drafter, prefill_chunk=32)
    engine.add([1, 2], LONG)
    engine.add([3, 4], LONG)
    engine.step()
    drafter.events.clear()
    engine.add([5] * 301, LONG)
    engine.add([6] * 20, LONG)
    while max(drafter.batches, default=0) < 4:
        assert {chunk.handle.id for chunk in engine.step()} >= {0, 1}
    sizes = [count for name, count in drafter.events if name == "prefill"]
    assert sum(sizes) == 300 + 19 and len(sizes) > 10
    read = 0
    for event in drafter.events:
        read = 0 if event[0] == "round" else read + event[1]
        assert read <= 32
    assert ("prefill", 32) in drafter.events
    for one, other in pairwise(drafter.events):
        assert not (one == other == ("prefill", 32)), "no round between two chunks"


def test_streams_run_in_as_few_passes_as_one_call(model: LlamaModel) -> None:
    drafter = Watching()
    engine = make_engine(model, drafter)
    asked = [[1, 2], [3, 4]]
    expected = texts(engine.generate(asked, LONG))
    together = len(drafter.batches)
    drafter.events.clear()
    said: list[list[int]] = [[], []]
    streams = [engine.stream(prompt, LONG) for prompt in asked]
    for chunks in zip(*streams, strict=True):
        for tokens, chunk in zip(said, chunks, strict=True):
            tokens += chunk.token_ids
    assert said == expected
    # One begins a round before the other, and ends so.
    assert len(drafter.batches) <= together + 1


def test_threads_share_one_batch(model: LlamaModel) -> None:
    """Whoever adds, streams or generates gets its own text."""
    drafter, count = Watching(), 8
    engine = make_engine(model, drafter, max_batch=count)
    asked = prompts(2 * count, VOCAB, seed=4)
    expected = [alone(model, prompt) for prompt in asked]
    door = Barrier(count)

    def added(prompt: list[int]) -> list[int]:
        # Steps of any thread hand over what was added: so this one asks only for its own text.
        return [t for chunk in engine.stream([prompt], LONG) for t in chunk.token_ids]

    def ask(number: int) -> list[list[int]]:
        door.wait()
        mine = asked[2 * number : 2 * number + 2]
        if number % 2:
            return texts(engine.generate(mine, LONG))
        return [added(prompt) for prompt in mine]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(count) as pool:
            said = [tokens for some in pool.map(ask, range(count)) for tokens in some]
    finally:
        sys.setswitchinterval(interval)
    assert said == expected
    assert max(drafter.batches) >= 3
    assert engine.is_idle and engine.cache.num_held_pages == 0


def test_some_add_while_one_steps(model: LlamaModel) -> None:
    engine, count = make_engine(model, max_batch=3), 8
    asked = prompts(count, VOCAB, seed=5)
    with ThreadPoolExecutor(count) as pool:
        adding = [pool.submit(engine.add, prompt, LONG) for prompt in asked]
        results = dict[RequestHandle, GenerationResult]()
        while len(results) < count:
            results |= run_all(engine)
    said = [results[one.result()].token_ids for one in adding]
    assert said == [alone(model, prompt) for prompt in asked]


def test_a_stream_that_is_thrown_away_leaves_the_others_alone(model: LlamaModel) -> None:
    engine = make_engine(model)
    handle = engine.add([1, 2], LONG)
    stream = engine.stream([[3, 4], [5, 6]], LONG)
    next(stream)
    assert engine.cache.num_held_pages == 3
    del stream
    gc.collect()
    assert engine.cache.num_held_pages == 1
    assert run_all(engine)[handle].token_ids == alone(model, [1, 2])


# --- processes --------------------------------------------------------------------------------


def _use_in_a_fork(engine: Engine, handle: RequestHandle, answers: Connection) -> None:
    said = []
    calls: tuple[Callable[[], object], ...] = (
        engine.step,
        lambda: engine.generate([1]),
        lambda: engine.stream([1]),
        lambda: engine.add([1]),
        lambda: engine.abort(handle),
    )
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            said.append(str(error))
    answers.send(said)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_refused_in_one_line(model: LlamaModel) -> None:
    engine = make_engine(model)
    handle = engine.add([1, 2], LONG)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_use_in_a_fork, args=(engine, handle, there))
    child.start()
    said = here.recv() if here.poll(60) else []
    child.join()
    assert len(said) == 5
    for line in said:
        assert line.startswith("engine: expected the process that loaded it, got a fork")
        assert "\n" not in line
    assert run_all(engine)[handle].token_ids == alone(model, [1, 2])


def test_times_are_of_the_whole_round(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a drafter takes to learn among it: by a clock that only drafters move."""
    now = [0.0]

    class Slow(EmptyDrafter):
        def propose(self, states, budget):  # type: ignore[no-untyped-def]
            now[0] += 2.0
            return super().propose(states, budget)

        def observe(self, *given):  # type: ignore[no-untyped-def]
            now[0] += 5.0

    monkeypatch.setattr("specrt.engine.round.perf_counter", lambda: now[0])
    monkeypatch.setattr(model.device, "mark", lambda: now[0])
    stats = make_engine(model, Slow()).generate([1, 2], max_new_tokens=3, ignore_eos=True).stats
    assert (stats.draft_ms, stats.verify_ms, stats.accept_ms) == (6000.0, 0.0, 15000.0)
