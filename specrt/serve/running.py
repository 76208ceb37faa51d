"""A server process: listens, serves, and ends as it is told to."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from specrt.serve.errors import ApiError
from specrt.serve.logs import LOG
from specrt.serve.options import ServeOptions
from specrt.serve.service import Service

_BACKLOG = 2048
_LAST_SECONDS = 3  # that connections have to close


class Protocol(HttpToolsProtocol):
    """uvicorn's reader of HTTP; what is none is refused in the form of all errors."""

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, and hang up."""
        answer = ApiError(400, msg, code="invalid_http", headers={"Connection": "close"}).response()
        fields = b"".join(name + b": " + value + b"\r\n" for name, value in answer.raw_headers)
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\n" + fields + b"\r\n" + bytes(answer.body)
        )
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which drains at the first SIGTERM or Ctrl-C and ends at the second.

    While it drains, running requests go on up to ``drain_seconds``, and new ones and ``/health``
    get 503.

    Args:
        config: of uvicorn.
        service: what is served.
        on_start: called when it listens.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, on_start: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service, self._on_start = service, on_start
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end, signal.Signals(sig).name)

    def _end(self, name: str) -> None:
        service = self._service
        if service.is_draining:
            LOG.info("%s again: open requests are ended", name)
            service.end_open()
            self.should_exit = True
            return
        service.is_draining = True
        LOG.info("%s: draining, %d open requests", name, len(service.open))
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        service = self._service
        loop = asyncio.get_running_loop()
        end = loop.time() + service.options.drain_seconds
        while (service.open or service.num_starting) and not self.should_exit:
            if loop.time() >= end:
                break
            await asyncio.sleep(0.02)
        service.end_open()
        self.should_exit = True


def listen(options: ServeOptions) -> socket.socket:
    """A socket at the server's address; connections are refused until it serves.

    Raises:
        ValueError: the address is none, or taken; names it.
    """
    try:
        found = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"host: {options.host} cannot be listened at: {error.strerror}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        place = f"{options.host}:{options.port}"
        raise ValueError(f"port: {place} cannot be listened at: {error.strerror}") from error
    return made


def config_of(app: object, options: ServeOptions) -> uvicorn.Config:
    """How uvicorn serves an application."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=options.host,
        port=options.port,
        http=Protocol,
        backlog=_BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
