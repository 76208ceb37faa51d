"""One engine, many users: threads, closing, and what cannot be handed on."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from specrt.draft.base import EmptyDrafter
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.engine.engine import Engine
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from tests.engine.support import make_engine, make_model, prompts, texts

VOCAB = 97
LONG = SamplingParams(max_new_tokens=24, temperature=1.0, seed=11, ignore_eos=True)


def in_another_thread(body: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


class Crowded(EmptyDrafter):
    """In its first round it lets another thread begin, and waits until that one waits or is in."""

    def __init__(self, model: LlamaModel, begin: Callable[[], None]) -> None:
        self._lock = model.lock
        self._begin = begin
        self._is_inside = self._is_overlapped = False
        self.thread: threading.Thread | None = None

    def propose(self, states, budget):  # type: ignore[no-untyped-def]
        if self._is_inside:
            self._is_overlapped = True
            raise RuntimeError("two threads are inside a round")
        self._is_inside = True
        if self.thread is None:
            self.thread = in_another_thread(self._begin)
            tries = range(10**7)
            assert any(self._lock._door.locked() or self._is_overlapped for _ in tries)
        return super().propose(states, budget)

    def observe(self, states, proposal, result, taps):  # type: ignore[no-untyped-def]
        self._is_inside = False

    def ended(self) -> bool:
        """Whether the rounds of both threads came one after another."""
        assert self.thread is not None
        self.thread.join()
        return not self._is_overlapped


@pytest.mark.parametrize("has_two_engines", [False, True])
def test_threads_take_turns(model: LlamaModel, has_two_engines: bool) -> None:
    first, second = prompts(2, VOCAB, seed=5)
    expected = [make_engine(model).generate(p, LONG).token_ids for p in (first, second)]
    got: list[list[int]] = []
    drafter = Crowded(model, lambda: got.append(others.generate(second, LONG).token_ids))
    engine = make_engine(model, drafter)
    others = make_engine(model, drafter) if has_two_engines else engine
    result = engine.generate(first, LONG)
    assert drafter.ended()
    assert [result.token_ids, *got] == expected


def test_threads_get_their_own_texts(model: LlamaModel, checkpoint: Path) -> None:
    engine = make_engine(model, SmallModelDrafter(make_model(checkpoint), depth=3), max_batch=2)
    asked = prompts(8, VOCAB, seed=2)
    expected = texts(make_engine(model).generate(asked, LONG))

    def streamed(prompt: list[int]) -> list[int]:
        return [token for chunk in engine.stream(prompt, LONG) for token in chunk.token_ids]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(streamed, asked)) == expected
        several = pool.map(lambda some: engine.generate(some, LONG), [asked[:3], asked[3:]])
        assert [one.token_ids for some in several for one in some] == expected
    assert engine.cache.num_free_pages == engine.cache.num_pages


@pytest.mark.parametrize("by_garbage_collector", [False, True])
def test_a_stream_closed_in_the_middle_of_anothers_round(
    model: LlamaModel, by_garbage_collector: bool
) -> None:
    """By another thread, or by the garbage collector in the round's own: when it ends, they are."""

    class Closing(EmptyDrafter):
        def observe(self, states, proposal, result, taps):  # type: ignore[no-untyped-def]
            batches.append(len(states))
            if open_streams and len(states) == 3:
                stream = open_streams.pop()
                if by_garbage_collector:
                    cycle = [stream]
                    cycle.append(cycle)  # type: ignore[arg-type]
                    del stream, cycle
                    gc.collect()
                else:
                    in_another_thread(stream.close).join()
                held.append(engine.cache.num_held_pages)

    batches: list[int] = []
    engine = make_engine(model, Closing())
    open_streams = [engine.stream([3, 4], LONG)]
    next(open_streams[0])
    of_one = engine.cache.num_held_pages
    held: list[int] = []
    others = engine.stream([[5, 6], [7, 8]], LONG)
    next(others)
    assert not open_streams and held == [3 * of_one], "freed while the buffers were in use"
    assert engine.cache.num_held_pages == 2 * of_one
    others.close()
    assert engine.cache.num_free_pages == engine.cache.num_pages


def test_a_drafter_that_asks_its_own_engine(
    model: LlamaModel, caplog: pytest.LogCaptureFixture
) -> None:
    class Asking(EmptyDrafter):
        def propose(self, states, budget):  # type: ignore[no-untyped-def]
            return engine.generate([1], LONG)

    engine = make_engine(model, Asking())
    assert (
        engine.generate([1, 2], LONG).token_ids
        == make_engine(model).generate([1, 2], LONG).token_ids
    )
    assert "from inside its own round" in caplog.text
    assert engine.cache.num_free_pages == engine.cache.num_pages


# --- closing ----------------------------------------------------------------------------------


def test_a_closed_engine_says_so(model: LlamaModel) -> None:
    with make_engine(model, PromptLookupDrafter()) as engine:
        begun, unbegun = engine.stream(prompts(3, VOCAB), LONG), engine.stream([1], LONG)
        next(begun)
    engine.close()  # again
    for stream in (begun, unbegun):
        with pytest.raises(RuntimeError, match="engine: expected an open one, got .* closed"):
            list(stream)
    for call in (
        lambda: engine.generate([1, 2]),
        lambda: engine.stream([1, 2]),
        lambda: engine.encode([1, 2]),
        lambda: engine.default_sampling,
        engine.__enter__,
    ):
        with pytest.raises(RuntimeError, match="engine: expected an open one, got .* closed"):
            call()
    assert repr(engine) == "Engine(closed)"


def test_closing_frees_everything_at_once(checkpoint: Path) -> None:
    """With no help of the garbage collector, and though a stream is still held."""
    drafter = SmallModelDrafter(make_model(checkpoint), depth=3)
    engine = make_engine(make_model(checkpoint), drafter)
    model, cache = weakref.ref(engine.target), engine.cache
    stream = engine.stream(prompts(3, VOCAB), LONG)
    next(stream)
    gc.disable()
    try:
        engine.close()
        assert model() is None
    finally:
        gc.enable()
    assert (cache.num_pages, cache.num_free_pages) == (0, 0)
    assert drafter._cache.num_free_pages == drafter._cache.num_pages
    with pytest.raises(RuntimeError, match="KV cache: expected one in use"):
        cache.open(1)


def test_closing_leaves_other_engines_of_the_target_alone(model: LlamaModel) -> None:
    expected = make_engine(model).generate([1, 2], LONG).token_ids
    one, other = make_engine(model), make_engine(model)
    stream = other.stream([1, 2], LONG)
    got = next(stream).token_ids
    one.generate([1, 2], LONG)
    one.close()
    assert got + [token for chunk in stream for token in chunk.token_ids] == expected


def test_an_engine_is_neither_copied_nor_pickled(model: LlamaModel) -> None:
    engine = make_engine(model)
    handing_on: tuple[Callable[[Engine], object], ...] = (copy.copy, copy.deepcopy, pickle.dumps)
    for hand_on in handing_on:
        with pytest.raises(TypeError, match=r"^Engine: cannot be pickled or copied; [^\n]*$"):
            hand_on(engine)


def test_what_an_engine_is_called(model: LlamaModel) -> None:
    engine = make_engine(model, PromptLookupDrafter(), max_batch=3)
    layers, hidden = model.config.num_layers, model.config.hidden_size
    assert repr(engine) == (
        f"Engine({layers} layers of {hidden}, vocabulary 97, float32 on cpu, "
        "drafter=PromptLookupDrafter, max_batch=3, max_nodes=64)"
    )
