"""A server in a thread, as a process would run it, and requests of plain bytes to it."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from specrt import AsyncEngine, Engine, load
from specrt.serve.app import make_app
from specrt.serve.options import ServeOptions
from specrt.serve.running import Server, config_of, listen
from specrt.serve.service import Service

NAME, KEY = "tested", "the-key-of-the-tests"
QUESTION = [{"role": "user", "content": "What is 3 plus 4?"}]
_SECONDS = 30.0


@dataclass
class Running:
    """A server that answers."""

    port: int
    engine: Engine
    service: Service
    client: httpx2.Client
    server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.client.post(path, json=body)

    def chat(self, **body: Any) -> httpx2.Response:
        return self.post("/v1/chat/completions", **{"messages": QUESTION, **body})

    def ok(self, path: str, **body: Any) -> Any:
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        """What a stream's events hold, the last one ``[DONE]``."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            text = "".join(response.iter_text())
        return parsed(text)

    def figure(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        assert any(name.removesuffix("_total").removesuffix("_count") in line for line in lines)
        found = [line for line in lines if line.partition("{")[0].partition(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in found)


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


def parsed(text: str) -> list[Any]:
    pieces = [piece for piece in text.split("\n\n") if piece and not piece.startswith(":")]
    lines = [piece.splitlines()[-1].removeprefix("data: ") for piece in pieces]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def raw(server: Running, body: bytes, **headers: str) -> socket.socket:
    """A connection over which a chat was asked for, and that stays open."""
    fields = {"Authorization": None, "Connection": None, **headers}
    made = socket.create_connection(("127.0.0.1", server.port))
    made.sendall(http_request("POST", "/v1/chat/completions", body, fields))
    return made


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for what comes by itself."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def is_at_rest(engine: Engine) -> bool:
    stats = engine.stats
    return engine.is_idle and stats.num_held_pages == 0


def load_small(**limits: int) -> Engine:
    return load("builtin", "fspad", **limits)


@contextmanager
def running(engine: Engine, name: str = "tiny", **options: Any) -> Iterator[Running]:
    """Serve an engine, which stays its owner's."""
    chosen = ServeOptions(port=0, **options)
    with listen(chosen) as listening:
        served = AsyncEngine(engine)
        app = make_app(served, name, chosen)
        started = threading.Event()
        server = Server(config_of(app, chosen), app.state.service, started.set)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        assert started.wait(30)
        port = listening.getsockname()[1]
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                yield Running(port, engine, app.state.service, client, server)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            server.handle_exit(signal.SIGTERM, None)  # at once
            thread.join()
            served.close()


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
