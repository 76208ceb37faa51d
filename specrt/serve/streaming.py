"""Answers as server-sent events.

A route has a writer that says what each chunk of the engine's looks like; what is common is here:
comments while nothing comes, errors behind the first event, ``[DONE]``, a client that is gone.

Beyond OpenAI's fields a chunk of ``/v1/chat/completions`` and ``/v1/completions`` may have
``x_specrt``, at its top. If the request has ``"x_specrt": {"trees": true}``, each chunk of a round
has (the playground reads it)::

    "x_specrt": {
        "accepted": 2,                      how many of its tokens, the first ones, were drafted
        "tokens": [" four", " apples", "."],        the round's tokens; together, in time, its text
        "tree": {                           null where rounds were merged for a slow reader
            "tokens": ["4", " four", " apples", " pears"],   node 0 is the last token before
            "parents": [-1, 0, 1, 1],
            "path": [0, 1, 2]               accepted nodes, the root first
        }
    }

and the chunk with ``finish_reason`` has, for every request::

    "x_specrt": {"rounds": 9, "drafted": 40, "accepted": 14, "tau": 2.56, "seed": 1, ...}

``accepted`` there is of the whole answer. Which choice a chunk is of tells ``choices[0].index``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from specrt.engine.results import StreamChunk
from specrt.serve.answering import Answering
from specrt.serve.errors import ApiError, to_json
from specrt.serve.token_texts import TokenTexts

_HEADERS = {
    "Cache-Control": "no-cache",
    "Connection": "keep-alive",
    "X-Accel-Buffering": "no",  # or nginx would collect events
}
DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"
_MARK = "\0text"
_GRACE_SECONDS = 5.0


class Writer(Protocol):
    """A route's events."""

    def opening(self) -> bytes:
        """What comes before the first chunk."""

    def chunk(self, chunk: StreamChunk) -> bytes:
        """The events of a chunk; may be empty."""

    def closing(self) -> bytes:
        """What comes behind the last chunk."""

    def failing(self, error: ApiError) -> bytes:
        """What comes instead, if there is none."""


class EventStream(Response):
    """A response whose events are made as the engine's chunks come.

    Args:
        answering: whose chunks; it was started, so that refusals have their own status.
        writer: the events.
        ping_seconds: after which a comment is sent, if nothing was; 0: never.
        limit_seconds: of the whole, for clients that do not read.
    """

    media_type = "text/event-stream"

    def __init__(
        self, answering: Answering, writer: Writer, ping_seconds: float, limit_seconds: float
    ) -> None:
        super().__init__(headers=_HEADERS, media_type=self.media_type)
        del self.headers["content-length"]
        self._answering, self._writer = answering, writer
        self._ping_seconds, self._limit_seconds = ping_seconds, limit_seconds
        self._sent = 0.0
        self._pings: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            with self._answering.watched(receive):
                await send(start)
                self._sent = time.monotonic()
                if self._ping_seconds:
                    self._pings = asyncio.get_running_loop().create_task(self._ping(send))
                await asyncio.wait_for(self._write(send), self._limit_seconds + _GRACE_SECONDS)
        finally:
            self._stop_pings()

    async def _write(self, send: Send) -> None:
        answering, writer = self._answering, self._writer
        await self._send(send, writer.opening())
        try:
            async for chunk in answering:
                data = writer.chunk(chunk)
                if data:
                    await self._send(send, data)
            answering.require()
        except ClientDisconnect:
            return
        except ApiError as error:
            await self._send(send, writer.failing(error))
        else:
            await self._send(send, writer.closing())
        self._stop_pings()  # nothing may come behind the end
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, data: bytes) -> None:
        self._sent = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    def _stop_pings(self) -> None:
        if self._pings is not None:
            self._pings.cancel()

    async def _ping(self, send: Send) -> None:
        while True:
            left = self._sent + self._ping_seconds - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
            else:
                await self._send(send, _PING)


def event(data: Any, name: str | None = None) -> bytes:
    """One event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + to_json(data) + b"\n\n"


class TextEvent:
    """An event in which nothing but a text changes: the rest of it is written once.

    Args:
        make: makes one of a text.
    """

    def __init__(self, make: Callable[[str], bytes]) -> None:
        self._before, self._behind = make(_MARK).split(to_json(_MARK))

    def of(self, text: str) -> bytes:
        """The event of a text."""
        return self._before + to_json(text) + self._behind


def round_report(chunk: StreamChunk, texts: TokenTexts) -> dict[str, Any]:
    """What a chunk tells of its round."""
    return {
        "accepted": chunk.num_accepted,
        "tokens": _texts(chunk.token_ids, texts),
        "tree": None
        if chunk.tree is None
        else {
            "tokens": _texts(chunk.tree.token_ids, texts),
            "parents": chunk.tree.parents,
            "path": chunk.tree.path,
        },
    }


def _texts(ids: Sequence[int], texts: TokenTexts) -> list[str]:
    return [texts.text_of(token) for token in ids]
