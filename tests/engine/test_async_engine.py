"""An engine for event loops: the same text, ends at once when nobody reads, one thread for all."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from specrt import AsyncEngine, DraftParams, Engine, QueueFullError, SamplingParams, StreamChunk
from tests.engine.support import make_engine, make_model, prompts

LONG = 400  # tokens, of answers that are not to end by themselves


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return make_model(checkpoint)


@pytest.fixture
def engine(model: Any) -> Iterator[Engine]:
    with make_engine(model, max_batch=4) as made:
        yield made


def run(main: Any) -> Any:
    return asyncio.run(asyncio.wait_for(main, 60))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def is_at_rest(engine: Engine) -> bool:
    stats = engine.stats
    return engine.is_idle and stats.num_held_pages == 0


def text_of(chunks: list[StreamChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_texts_are_those_of_the_engine_itself(engine: Engine) -> None:
    asked = prompts(6, 90)
    params = [SamplingParams(24, temperature=i % 2, seed=i, ignore_eos=True) for i in range(6)]
    want = engine.generate(asked, params)

    async def one(served: AsyncEngine, number: int) -> list[StreamChunk]:
        return [chunk async for chunk in served.stream(asked[number], params[number])]

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            told = await asyncio.gather(*(one(served, number) for number in range(6)))
            whole = await served.generate(asked, params)
        for chunks, result, wanted in zip(told, whole, want, strict=True):
            assert [t for chunk in chunks for t in chunk.token_ids] == wanted.token_ids
            assert text_of(chunks) == wanted.text == result.text
            assert [chunk.result is None for chunk in chunks[:-1]] == [True] * (len(chunks) - 1)

    run(main())


def test_one_result_or_a_list(engine: Engine) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as served:
            one = await served.generate([1, 2], max_new_tokens=2)
            many = await served.generate([[1, 2]], max_new_tokens=2)
            assert [one.token_ids] == [result.token_ids for result in many]

    run(main())


def test_each_choice_has_the_next_seed(engine: Engine) -> None:
    options = {"max_new_tokens": 6, "temperature": 1.0, "ignore_eos": True}
    seeds = [2**64 - 1, 0, 1]
    want = [engine.generate([5, 6], seed=seed, **options) for seed in seeds]

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            chunks = [c async for c in served.stream([5, 6], seed=2**64 - 1, n=3, **options)]
            results = await served.generate([5, 6], seed=-1, n=3, **options)
        for choice, wanted in enumerate(want):
            mine = [chunk for chunk in chunks if chunk.choice == choice]
            assert text_of(mine) == wanted.text
            assert results[choice].choice == choice
            assert results[choice].seed % 2**64 == seeds[choice]
            assert results[choice].token_ids == wanted.token_ids

    run(main())


def test_leaving_the_loop_ends_the_request(engine: Engine) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as served:
            async for _ in served.stream([1, 2, 3], max_new_tokens=LONG, ignore_eos=True):
                break
            await until(lambda: is_at_rest(engine))

    run(main())


def test_cancelling_a_task_ends_its_request(engine: Engine) -> None:
    async def read(served: AsyncEngine, started: asyncio.Event) -> None:
        async for _ in served.stream([1, 2, 3], max_new_tokens=LONG, ignore_eos=True):
            started.set()

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            started = asyncio.Event()
            task = asyncio.create_task(read(served, started))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: is_at_rest(engine))

    run(main())


def test_a_task_cancelled_while_its_prompt_is_encoded_leaves_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding, may_go_on = threading.Event(), threading.Event()
    encode = engine.encode

    def slow(*args: Any, **options: Any) -> list[int]:
        encoding.set()
        may_go_on.wait()
        return encode(*args, **options)

    monkeypatch.setattr(engine, "encode", slow)

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            stream = served.stream([{"role": "user", "content": "abc"}], max_new_tokens=LONG)
            task = asyncio.create_task(stream.start())
            await until(encoding.is_set)  # in another thread: this loop is free
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            may_go_on.set()
            again = await served.generate([1], max_new_tokens=1)
            assert len(again.token_ids) == 1
            await until(lambda: is_at_rest(engine))

    run(main())


def test_closing_a_stream_ends_who_reads_it(engine: Engine) -> None:
    async def read(stream: Any) -> int:
        return len([chunk async for chunk in stream])

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            stream = served.stream([1, 2, 3], max_new_tokens=LONG, ignore_eos=True)
            await stream.start()
            task = asyncio.create_task(read(stream))
            await asyncio.sleep(0)
            stream.close()
            assert await task < LONG
            assert await read(stream) == 0
            await until(lambda: is_at_rest(engine))

    run(main())


def test_threads_and_loops_share_one_batch(engine: Engine) -> None:
    asked = prompts(4, 90)
    want = engine.generate(asked, max_new_tokens=20)
    got: dict[int, str] = {}
    with_engine = AsyncEngine(engine)

    def thread(number: int) -> None:
        async def main() -> None:
            stream = with_engine.stream(asked[number], max_new_tokens=20)
            got[number] = text_of([chunk async for chunk in stream])

        run(main())

    threads = [threading.Thread(target=thread, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    with_engine.close()
    assert [got[number] for number in range(4)] == [result.text for result in want]


def test_who_reads_late_gets_merged_chunks_and_the_same_text(engine: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 100, "ignore_eos": True, "logprobs": True}
    want = engine.generate([7, 8], **options)

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            stream = served.stream([7, 8], **options)
            await stream.start()
            await until(lambda: engine.is_idle)
            chunks = [chunk async for chunk in stream]
        assert len(chunks) == 16
        assert text_of(chunks) == want.text
        assert [t for chunk in chunks for t in chunk.token_ids] == want.token_ids
        assert [x for chunk in chunks for x in chunk.logprobs or ()] == want.logprobs

    run(main())


def test_a_loop_is_woken_once_a_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    num_steps, num_calls = 0, 0
    step = engine.step

    def counted() -> list[StreamChunk]:
        nonlocal num_steps
        num_steps += 1
        return step()

    monkeypatch.setattr(engine, "step", counted)

    async def main() -> None:
        nonlocal num_calls
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def count(*args: Any, **options: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            return call(*args, **options)

        async with AsyncEngine(engine) as served:
            monkeypatch.setattr(loop, "call_soon_threadsafe", count)
            answers = (served.generate([i + 1], max_new_tokens=30) for i in range(4))
            await asyncio.gather(*answers)
            monkeypatch.undo()

    run(main())
    assert 0 < num_calls <= num_steps


def test_what_kills_the_thread_is_raised_by_all(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, may_fail = engine.step, threading.Event()

    def failing() -> list[StreamChunk]:
        if may_fail.is_set():
            raise ZeroDivisionError("planted")
        return step()

    monkeypatch.setattr(engine, "step", failing)

    async def main() -> None:
        served = AsyncEngine(engine)
        streams = [served.stream([i + 1], max_new_tokens=LONG, ignore_eos=True) for i in range(2)]
        for stream in streams:
            await anext(stream)
        may_fail.set()
        for stream in streams:
            with pytest.raises(ZeroDivisionError, match="planted"):
                await stream.results()
        with pytest.raises(RuntimeError, match="stepping thread ended.*ZeroDivisionError: planted"):
            served.stream([1])
        await served.aclose()
        monkeypatch.undo()
        engine.step()
        assert is_at_rest(engine)

    run(main())


def test_closing_ends_streams_and_refuses_further_ones(engine: Engine) -> None:
    async def main() -> None:
        served = AsyncEngine(engine)
        stream = served.stream([1], max_new_tokens=LONG, ignore_eos=True)
        await anext(stream)
        await served.aclose()
        await served.aclose()
        with pytest.raises(RuntimeError, match="AsyncEngine was closed"):
            await stream.results()
        with pytest.raises(RuntimeError, match="one that was closed"):
            served.stream([1])
        assert is_at_rest(engine)

    run(main())


def test_an_engine_that_nobody_holds_ends_its_thread(engine: Engine) -> None:
    def threads() -> list[str]:
        return [one.name for one in threading.enumerate() if one.name == "specrt-stepper"]

    async def main() -> None:
        served = AsyncEngine(engine)
        await served.generate([1], max_new_tokens=1)
        assert len(threads()) == 1

    run(main())
    gc.collect()
    assert threads() == []


def test_what_is_wrong_is_said_at_the_call(engine: Engine) -> None:
    served = AsyncEngine(engine)
    with pytest.raises(ValueError, match="temperature: expected"):
        served.stream([1], temperature=-1.0)
    small = AsyncEngine(make_engine(engine.target, max_nodes=2))
    with pytest.raises(ValueError, match="total_tokens: expected at most"):
        small.stream([1], draft=DraftParams(total_tokens=3))
    with pytest.raises(ValueError, match="prompts: expected text"):
        served.stream(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="colour"):
        served.stream([1], colour=3)  # type: ignore[call-arg]
    served.close()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt: expected at least one token"), ([10**6], "prompt: token id 1000000 is outside")],
)
def test_what_encoding_finds_is_said_with_the_first_chunk(
    engine: Engine, prompt: list[int], message: str
) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as served:
            with pytest.raises(ValueError, match=message):
                await anext(served.stream([prompt]))
            with pytest.raises(ValueError, match=r"prompts\[1\]: "):
                await served.generate([[1], prompt])
            await until(lambda: is_at_rest(engine))

    run(main())


def test_a_full_queue_takes_all_or_none(model: Any) -> None:
    async def main() -> None:
        with make_engine(model, max_batch=1, max_waiting=2) as engine:
            async with AsyncEngine(engine) as served:
                with pytest.raises(QueueFullError):
                    await served.generate([1], n=3, temperature=1.0)
                await until(lambda: is_at_rest(engine))
                assert len(await served.generate([1], n=2, max_new_tokens=2)) == 2

    run(main())


def test_two_tasks_cannot_read_one_stream(engine: Engine) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as served:
            stream = served.stream([1, 2], max_new_tokens=LONG, ignore_eos=True)
            both = asyncio.gather(anext(stream), anext(stream), return_exceptions=True)
            assert [type(one) for one in await both] == [StreamChunk, RuntimeError]

    run(main())
