"""A GPU that is lost ends every request once, in CUDA's words, and refuses all that comes later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from tests.engine.support import make_engine, make_model, prompts, texts
from tests.fake_cuda import FragileGpu

LONG = SamplingParams(max_new_tokens=30, temperature=1.0, seed=11, ignore_eos=True)
LOST = "GPU lost: CUDA error: an illegal memory access was encountered"
REFUSED = r"engine: its GPU was lost by an earlier error \(CUDA error: an illegal memory .*\)"
ASKED = prompts(5, 97)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return texts(make_engine(make_model(checkpoint)).generate(ASKED, LONG))


def check_lost(results: Sequence[GenerationResult], expected: Sequence[Sequence[int]]) -> None:
    """What was said before is right."""
    for result, answer in zip(results, expected, strict=True):
        assert (result.finish_reason, result.error) == ("error", LOST)
        assert result.token_ids == list(answer[: len(result.token_ids)])


def check_refuses(engine: Engine) -> None:
    """All that needs the GPU; the rest works."""
    for call in (
        lambda: engine.generate([1, 2], LONG),
        lambda: next(engine.stream([1, 2], LONG)),
        lambda: engine.add([1, 2], LONG),
        engine.step,
        engine.step,
    ):
        with pytest.raises(RuntimeError, match=REFUSED):
            call()
    assert engine.is_idle and engine.encode([1, 2]) == [1, 2]
    assert engine.cache.num_free_pages == engine.cache.num_pages
    engine.close()
    engine.close()


@pytest.mark.parametrize("num_good", [0, 1, 4, 9, 20])
def test_generate(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]], num_good: int
) -> None:
    """In the first prompt, among prompts and rounds; some wait."""
    FragileGpu(model, monkeypatch, num_good)
    engine = make_engine(model, max_batch=2)
    check_lost(engine.generate(ASKED, LONG), expected)
    check_refuses(engine)


def test_tables_that_cannot_be_written_any_more(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    gpu = FragileGpu(model, monkeypatch, 20)
    engine = make_engine(model, max_batch=3)
    batch = engine._core._batches
    leave, clear = batch.leave, batch.clear
    monkeypatch.setattr(batch, "leave", lambda request: (gpu.wait(), leave(request)))
    monkeypatch.setattr(batch, "clear", lambda: (gpu.wait(), clear()))
    check_lost(engine.generate(ASKED, LONG), expected)
    check_refuses(engine)


def test_stream(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    FragileGpu(model, monkeypatch, 20)
    engine = make_engine(model, max_batch=3)
    told = list(engine.stream(ASKED, LONG))
    ends = [chunk for chunk in told if chunk.result is not None]
    assert sorted(chunk.index for chunk in ends) == list(range(5))
    for chunk in ends:
        assert chunk.result is not None
        check_lost([chunk.result], [expected[chunk.index]])
        said = [t for one in told if one.index == chunk.index for t in one.token_ids]
        assert said == chunk.result.token_ids
    assert any(chunk.token_ids for chunk in told)
    check_refuses(engine)


def test_step_by_step(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    FragileGpu(model, monkeypatch, 12)
    engine = make_engine(model, max_batch=2)
    handles = [engine.add(ids, LONG) for ids in ASKED]
    ends = Counter[int]()
    while not engine.is_idle:
        for chunk in engine.step():
            if chunk.result is not None:
                assert chunk.result.error == LOST
                ends[chunk.handle.id] += 1
    assert ends == Counter(handle.id for handle in handles)
    assert not any(engine.abort(handle) for handle in handles)
    check_refuses(engine)


def test_threads_that_share_a_batch(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    FragileGpu(model, monkeypatch, 25)
    engine, begun = make_engine(model, max_batch=3), Barrier(len(ASKED))

    def ask(number: int) -> GenerationResult:
        begun.wait()
        return engine.generate(ASKED[number], LONG)

    with ThreadPoolExecutor(len(ASKED)) as pool:
        check_lost(list(pool.map(ask, range(len(ASKED)))), expected)
    check_refuses(engine)


def test_another_threads_step_tells_who_steps_himself(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    FragileGpu(model, monkeypatch, 6)
    engine = make_engine(model)
    handle = engine.add(ASKED[1], LONG)
    assert engine.generate(ASKED[2], LONG).error == LOST
    last = engine.step()[-1]  # not refused: this was not told yet
    assert last.handle == handle and last.result is not None and last.result.error == LOST
    check_refuses(engine)


def test_what_the_queue_has_no_room_for_is_refused(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    FragileGpu(model, monkeypatch, 3)
    engine = make_engine(model, max_batch=1, max_waiting=1)
    stream, ends = engine.stream(ASKED, LONG), list[int]()
    with pytest.raises(RuntimeError, match=REFUSED):
        ends += [chunk.index for chunk in stream if chunk.result is not None]
    check_refuses(engine)


def test_who_came_while_it_was_lost_hears_of_it(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the question whether it works and the queue another thread's step may lose it."""
    FragileGpu(model, monkeypatch, 0)
    engine = make_engine(model)
    add = engine._core.scheduler.add

    def late(request) -> None:  # type: ignore[no-untyped-def]
        assert engine.generate(ASKED[2], LONG).error == LOST
        add(request)

    monkeypatch.setattr(
        engine._core.scheduler, "add", lambda request: (swap.pop() if swap else add)(request)
    )
    swap = [late]
    handle = engine.add(ASKED[1], LONG)
    (chunk,) = engine.step()
    assert chunk.handle == handle and chunk.result is not None and chunk.result.error == LOST
    check_refuses(engine)


def test_a_drafter_that_loses_it(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    class Losing(PromptLookupDrafter):
        def propose(self, states, budget):  # type: ignore[no-untyped-def]
            if len(states[0].token_ids) > states[0].prompt_len + 2:
                gpu.lose()
                gpu.wait()
            return super().propose(states, budget)

    gpu = FragileGpu(model, monkeypatch, 1000)
    engine = make_engine(model, Losing(), max_batch=3)
    check_lost(engine.generate(ASKED, LONG), expected)
    check_refuses(engine)


def test_closing_an_engine_whose_gpu_another_one_lost(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FragileGpu(model, monkeypatch, 1000)
    engine = make_engine(model)
    engine.add([1, 2], LONG)
    engine.step()
    monkeypatch.setattr(engine.cache, "retire", gpu.wait)
    gpu.lose()
    engine.close()
    other = make_engine(model)

    def retire() -> None:
        raise RuntimeError("broken otherwise")

    monkeypatch.setattr(other.cache, "retire", retire)
    monkeypatch.setattr(model.device, "wait", lambda: None)
    with pytest.raises(RuntimeError, match="broken otherwise"):
        other.close()


# --- errors that leave the device whole -----------------------------------------------------------


@pytest.mark.parametrize("num_good", [7, 20])
def test_no_memory_for_a_round_takes_one_fewer(
    model: LlamaModel,
    monkeypatch: pytest.MonkeyPatch,
    expected: list[list[int]],
    num_good: int,
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    gpu = FragileGpu(model, monkeypatch, num_good, error, is_lost=False)
    engine = make_engine(model, max_batch=4, prefill_chunk=4096)
    assert texts(engine.generate(ASKED, LONG)) == expected
    assert gpu.num_left < -1 and engine._core.scheduler.max_batch < 4


def test_a_launch_that_cannot_be_started_loses_nothing(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    error = RuntimeError("rms_norm: invalid configuration argument")
    FragileGpu(model, monkeypatch, 20, error, is_lost=False)
    engine = make_engine(model, prefill_chunk=4096)
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        engine.generate(ASKED, LONG)
    assert texts(engine.generate(ASKED, LONG)) == expected
