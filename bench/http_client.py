"""A small HTTP/1.1 client for loading a server: little work of its own, every way of leaving.

The standard library alone, so that ``python -m bench.http_client`` starts in some 50 ms: it opens
streams and reads them until it is killed (``bench.serve_soak`` does that).
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

DONE = b"[DONE]"
_ABORTIVE = struct.pack("ii", 1, 0)
_LIMIT = 2**20


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int


def request_bytes(
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    key: str | None = None,
) -> bytes:
    """A request of one connection; ``headers`` replace what would be written by itself."""
    fields = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    if key is not None:
        fields["Authorization"] = f"Bearer {key}"
    fields.update(headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def post(path: str, body: Mapping[str, Any], *, key: str | None = None) -> bytes:
    """A request with a body of JSON."""
    return request_bytes("POST", path, json.dumps(body).encode(), key=key)


class Reply:
    """The reply to one request, read as far as its reader likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}

    async def read_head(self) -> None:
        """Status and headers.

        Raises:
            ConnectionError: the server went away.
        """
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("closed before a reply") from error
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        for line in filter(None, lines):
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            ConnectionError: it ended in the middle.
        """
        try:
            if self.headers.get("transfer-encoding") != "chunked":
                length = int(self.headers.get("content-length", -1))
                yield await (
                    self._reader.read() if length < 0 else self._reader.readexactly(length)
                )
                return
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("closed in the middle of a reply") from error

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[bytes]:
        """The data of server-sent events; comments are left out."""
        held = b""
        async for piece in self.pieces():
            *events, held = (held + piece).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event[6:]

    def close(self) -> None:
        """Leave as programs do that end."""
        self._writer.close()

    def reset(self) -> None:
        """Leave by a RST, as a machine does that was cut off."""
        made: socket.socket = self._writer.get_extra_info("socket")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE)
        self._writer.transport.abort()


async def send(address: Address, request: bytes, *, receive_buffer: int | None = None) -> Reply:
    """Open a connection and write a request; the reply's head is still to be read.

    Args:
        receive_buffer: bytes that the kernel keeps for a slow reader.
    """
    made = socket.socket()
    made.setblocking(False)
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await asyncio.get_running_loop().sock_connect(made, (address.host, address.port))
        limit = _LIMIT if receive_buffer is None else receive_buffer
        reader, writer = await asyncio.open_connection(sock=made, limit=max(limit, 2**12))
    except BaseException:
        made.close()
        raise
    writer.write(request)
    return Reply(reader, writer)


async def ask(address: Address, request: bytes) -> tuple[int, bytes]:
    """Status and body of one request."""
    reply = await send(address, request)
    try:
        await reply.read_head()
        return reply.status, await reply.body()
    finally:
        reply.close()


async def _read_forever(address: Address, request: bytes) -> None:
    while True:
        reply = await send(address, request)
        await reply.read_head()
        print(reply.status, flush=True)
        async for _ in reply.events():
            pass
        reply.close()


async def _main(host: str, port: str) -> None:
    requests = [bytes.fromhex(line) for line in sys.stdin.read().split()]
    address = Address(host, int(port))
    await asyncio.gather(*(_read_forever(address, request) for request in requests))


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
