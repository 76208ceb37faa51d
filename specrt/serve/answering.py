"""One request while it is answered: its chunks, what may end it early, its figures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from specrt.engine.async_engine import AsyncStream
from specrt.engine.results import GenerationResult, StreamChunk
from specrt.serve.errors import ApiError, refused

if TYPE_CHECKING:
    from specrt.serve.service import Service

Early = Literal["gone", "timeout", "drained"]


class Answering(AsyncIterator[StreamChunk]):
    """Chunks of a request's stream, until its end or until there is a reason to stop.

    Args:
        service: whose figures count it.
        stream: of the engine.
        request: of HTTP.
    """

    def __init__(self, service: Service, stream: AsyncStream, request: Request) -> None:
        self.stream = stream
        self.request = request
        self.results: dict[tuple[int, int], GenerationResult] = {}
        """By prompt and choice, of those that have ended."""
        self.early: Early | None = None
        """Why it was ended, if it did not end by itself."""
        self._service = service
        self._metrics = service.metrics
        self._num_asked = sum(map(len, stream.params))
        self._num_tokens = 0
        self._asked = time.monotonic()
        self._last: float | None = None
        self._first: float | None = None

    @property
    def seed(self) -> int:
        """The first answer's; the others' follow."""
        return self.stream.params[0][0].seed or 0

    def end(self, reason: Early) -> None:
        """Stop; its reader comes to its end, and the engine's requests within a round. What has all
        been answered is not ended early: servers call a client gone behind the last byte too."""
        if self.early is None and len(self.results) < self._num_asked:
            self.early = reason
            self.stream.close()

    @contextmanager
    def watched(self, receive: Receive) -> Iterator[None]:
        """End it when its client is gone or its time is over, as long as this is open."""
        loop = asyncio.get_running_loop()
        gone = loop.create_task(self._wait_until_gone(receive))
        timer = loop.call_later(self._service.options.request_seconds, self.end, "timeout")
        self._service.open.add(self)
        try:
            yield
        finally:
            self._service.open.discard(self)
            timer.cancel()
            gone.cancel()
            self.stream.close()
            self._count()

    async def _wait_until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end("gone")

    async def __anext__(self) -> StreamChunk:
        try:
            chunk = await self.stream.__anext__()
        except StopAsyncIteration:
            raise
        except Exception as error:  # what ended the engine's thread
            raise ApiError(503, f"the engine failed: {error}", code="engine_failed") from error
        now, metrics = time.monotonic(), self._metrics
        if self._last is None:
            self._first = now
            metrics.first_token.observe(now - self._asked)
        else:
            metrics.between.observe(now - self._last)
        self._last = now
        self._num_tokens += len(chunk.token_ids)
        metrics.generation_tokens.inc(len(chunk.token_ids))
        result = chunk.result
        if result is not None:
            self.results[chunk.index, chunk.choice] = result
        return chunk

    async def whole(self, receive: Receive) -> list[GenerationResult]:
        """Wait for all answers; by prompt and choice.

        Raises:
            ApiError: it took too long (504), the server ends (503), or an answer failed (500).
            ClientDisconnect: nobody waits any more.
        """
        with self.watched(receive):
            async for _ in self:
                pass
        self.require()
        return self.in_order()

    def in_order(self) -> list[GenerationResult]:
        """The results by prompt and choice."""
        return [self.results[number] for number in sorted(self.results)]

    def require(self) -> None:
        """Refuse to go on if it did not come to its end.

        Raises:
            ApiError, ClientDisconnect: as :meth:`whole`.
        """
        if self.early == "gone":
            raise ClientDisconnect
        if self.early == "timeout":
            seconds = self._service.options.request_seconds
            raise ApiError(504, f"the answer took longer than {seconds:g} s")
        if self.early == "drained":
            raise ApiError(503, "the server was shut down")
        for result in self.results.values():
            if result.error is not None and result.error.startswith("structured: "):
                raise refused(ValueError(result.error))  # a form that grows too large on its way
            if result.error is not None:
                raise ApiError(500, f"the answer failed: {result.error}", code="generation_failed")

    def _count(self) -> None:
        metrics, stream = self._metrics, self.stream
        for ids in stream.prompt_ids:
            metrics.prompt_tokens.inc(len(ids))
            metrics.prompt_sizes.observe(len(ids))
        prefill = 0.0
        for result in self.results.values():
            metrics.count_result(result)
            prefill = max(prefill, result.stats.prefill_ms / 1000)
        for _ in range(self._num_asked - len(self.results)):
            metrics.count_end("abort")
        self._tell_log()
        if self._first is None or self._last is None:
            return
        metrics.whole.observe(self._last - self._asked)
        metrics.queue.observe(max(0.0, self._first - self._asked - prefill))
        metrics.decode.observe(self._last - self._first)

    def _tell_log(self) -> None:
        results = self.in_order()
        rounds = sum(result.stats.num_rounds for result in results)
        num_tokens = sum(len(result.token_ids) for result in results)
        figures: dict[str, Any] = {
            "prompt_tokens": sum(map(len, self.stream.prompt_ids)),
            "output_tokens": self._num_tokens,  # of answers that were cut, too
            "tau": round(num_tokens / rounds, 2) if rounds else None,
            "first_ms": None if self._first is None else _ms(self._first - self._asked),
            "ended": self.early or ",".join(result.finish_reason for result in results),
        }
        if self._service.options.log_prompts:
            decode = self._service.tokenizer.decode
            figures["prompts"] = [decode(ids) for ids in self.stream.prompt_ids]
            figures["answers"] = [result.text for result in results]
        self.request.scope["specrt.figures"] = figures


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
