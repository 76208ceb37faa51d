"""A server in a thread, as a process would run it."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from specrt import AsyncEngine, Engine, load
from specrt.serve.app import make_app
from specrt.serve.options import ServeOptions
from specrt.serve.running import Server, config_of, listen
from specrt.serve.service import Service

QUESTION = [{"role": "user", "content": "What is 3 plus 4?"}]


@dataclass
class Running:
    """A server that answers."""

    url: str
    engine: Engine
    service: Service
    client: httpx2.Client
    server: Server

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
        found = [line for line in lines if line.partition("{")[0].partition(" ")[0] == name]
        assert found, name
        return sum(float(line.rpartition(" ")[2]) for line in found)


def parsed(text: str) -> list[Any]:
    pieces = [piece for piece in text.split("\n\n") if piece and not piece.startswith(":")]
    lines = [piece.splitlines()[-1].removeprefix("data: ") for piece in pieces]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def raw(server: Running, body: bytes, **headers: str) -> socket.socket:
    """A connection over which a chat was asked for."""
    made = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    fields = {"Host": "localhost", "Content-Type": "application/json"}
    fields |= {"Content-Length": str(len(body))} | headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    made.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + body)
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
def running(engine: Engine, **options: Any) -> Iterator[Running]:
    """Serve an engine, which stays its owner's."""
    chosen = ServeOptions(port=0, **options)
    with listen(chosen) as listening:
        served = AsyncEngine(engine)
        app = make_app(served, "tiny", chosen)
        started = threading.Event()
        server = Server(config_of(app, chosen), app.state.service, started.set)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        assert started.wait(30)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            with httpx2.Client(base_url=url, timeout=60) as client:
                yield Running(url, engine, app.state.service, client, server)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            server.handle_exit(signal.SIGTERM, None)  # at once
            thread.join()
            served.close()
