"""A server that has the page and answers its calls as a test says, byte for byte."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from specrt.serve.page_routes import PAGE_FILES, page_routes

MODEL = {"id": "tiny", "object": "model", "drafter": "FspadDrafter", "max_model_len": 2048}
DONE = b"data: [DONE]\n\n"


class Drop(Exception):
    """Ends a connection in the middle of an answer."""


Step = bytes | threading.Event | Drop
"""Sent; waited for; or the end of the connection."""


@dataclass
class Asked:
    """A call that came."""

    path: str
    key: str | None
    body: Any
    is_gone: threading.Event = field(default_factory=threading.Event)
    """Its client left before the answer was whole."""


@dataclass
class _Answer:
    steps: Sequence[Step]
    status: int
    headers: dict[str, str]


class Canned:
    """The application, and what was asked of it."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[Asked] = []
        self.models: list[_Answer] = []
        """What ``/v1/models`` answers next; then the one model."""
        self._answers: deque[_Answer] = deque()
        self._page = FastAPI(openapi_url=None)
        self._page.include_router(page_routes())

    def reset(self) -> None:
        """Forget what was asked and what is to be answered."""
        self.asked.clear()
        self.models.clear()
        self._answers.clear()

    def stream(self, *steps: Step) -> None:
        """Answer the next call so."""
        kind = {"content-type": "text/event-stream; charset=utf-8"}
        self._answers.append(_Answer(steps, 200, kind))

    def refuse(self, status: int, message: str, of_models: bool = False, **headers: str) -> None:
        """Refuse the next call, or the next one for the models."""
        body = json.dumps({"error": {"message": message, "code": "x", "param": None}}).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = _Answer([body], status, {"content-type": "application/json", **named})
        (self.models if of_models else self._answers).append(answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in PAGE_FILES:
            await self._page(scope, receive, send)
            return
        body = b""
        while (message := await receive()).get("more_body") or message.get("body"):
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        asked = Asked(path, headers.get("authorization"), json.loads(body) if body else None)
        if path == "/v1/models":
            data = json.dumps({"object": "list", "data": [MODEL]}).encode()
            kind = {"content-type": "application/json"}
            answer = self.models.pop(0) if self.models else _Answer([data], 200, kind)
        else:
            self.asked.append(asked)
            answer = self._answers.popleft()
        await _send(answer, asked, receive, send)


async def _send(answer: _Answer, asked: Asked, receive: Receive, send: Send) -> None:
    headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    leaving = asyncio.ensure_future(receive())
    for step in answer.steps:
        if isinstance(step, Drop):
            await asyncio.sleep(0.05)  # what was sent arrives before
            raise step
        if isinstance(step, bytes):
            await send({"type": "http.response.body", "body": step, "more_body": True})
            continue
        while not step.is_set() and not leaving.done():
            await asyncio.sleep(0.005)
    if leaving.done():
        asked.is_gone.set()
    leaving.cancel()
    await send({"type": "http.response.body", "body": b""})


@contextmanager
def canned() -> Iterator[Canned]:
    """Run it in a thread."""
    app = Canned()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="critical", lifespan="off")  # type: ignore[arg-type]
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield app
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


# --- what a server says ---------------------------------------------------------------------------


def event(
    text: str = "", *, finish: str | None = None, more: Any = None, raw: bool = False
) -> bytes:
    """A chunk; ``raw``: of ``/v1/completions``."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    choice |= {"text": text} if raw else {"delta": {"content": text}}
    data = {"object": "chunk", "model": "tiny", "choices": [choice]}
    if more is not None:
        data["x_specrt"] = more
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def round_of(
    drafted: Sequence[str],
    own: str | None,
    *,
    text: str | None = None,
    refused: int = 1,
    **more: Any,
) -> bytes:
    """A round: what was drafted and accepted, the target's token, ``refused`` nodes beside."""
    tokens = [*drafted, *([] if own is None else [own])]
    chain = ["root", *drafted]
    tree = {
        "tokens": chain + ["no"] * refused,
        "parents": [-1, *range(len(drafted))] + [0] * refused,
        "path": list(range(len(chain))),
    }
    shown = "".join(tokens) if text is None else text
    return event(shown, more={"accepted": len(drafted), "tokens": tokens, "tree": tree}, **more)


def end(tokens: int, rounds: int, *, finish: str = "stop", raw: bool = False) -> bytes:
    """How an answer ends, its usage and ``[DONE]``."""
    report = {"rounds": rounds, "drafted": 40, "accepted": tokens - rounds, "seed": 7}
    report |= {"tau": round(tokens / rounds, 4), "prefill_ms": 3.0, "round_ms": 12.0}
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": tokens + 5}
    last = json.dumps({"choices": [], "usage": usage}).encode()
    return event(finish=finish, more=report, raw=raw) + b"data: " + last + b"\n\n" + DONE


def opening() -> bytes:
    """What a chat's stream begins with, behind a comment."""
    return b": ping\n\n" + event("")
