"""A server in a thread of this process, and requests of plain bytes to it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI

from specrt.engine.async_engine import AsyncEngine
from specrt.engine.engine import Engine
from specrt.serve.app import make_app
from specrt.serve.options import ServeOptions
from specrt.serve.running import config_of

NAME, KEY = "tested", "the-key-of-the-tests"
_SECONDS = 30.0


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    app: FastAPI
    port: int


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error object, its form checked."""
        told = json.loads(self.body)
        assert told.keys() == {"error"}, told
        error = told["error"]
        assert error.keys() == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str) and error["message"]
        assert isinstance(error["type"], str) and isinstance(error["code"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        return dict(error)


@contextmanager
def running(engine: Engine, options: ServeOptions) -> Iterator[Running]:
    """Serve an engine until the end of ``with``."""
    with_loop = AsyncEngine(engine)
    app = make_app(with_loop, NAME, options)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(config_of(app, options))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield Running(app, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
            with_loop.close()


def http_request(
    method: str,
    path: str,
    body: bytes | None = b"",
    headers: Mapping[str, str | None] | None = None,
) -> bytes:
    """A request as it is written; a header of None is left out, as are those of a body of None."""
    fields: dict[str, str | None] = {
        "Host": "localhost",
        "Authorization": f"Bearer {KEY}",
        "Connection": "close",
    }
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    fields.update(headers or {})
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
    return head.encode("latin-1") + (body or b"")


def send(port: int, request: bytes, *, is_closed: bool = False) -> Answer | None:
    """Send bytes and read to the end.

    Args:
        port: of the server.
        request: whatever it is.
        is_closed: whether nothing more will come behind them, which the server is told.

    Returns:
        None: it hung up without a word.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=_SECONDS) as made:
        try:
            made.sendall(request)
            if is_closed:
                made.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all was read
        data = b""
        try:
            while piece := made.recv(1 << 16):
                data += piece
        except ConnectionResetError:
            pass  # what it had not read was thrown away
    return answer_of(data) if data else None


def answer_of(data: bytes) -> Answer:
    """Taken apart; chunks put together."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if headers.get("transfer-encoding") == "chunked":
        rest, body = body, b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return Answer(int(first.split()[1]), headers, body)
