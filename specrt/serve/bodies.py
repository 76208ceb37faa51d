"""Bodies of requests: not too large, not too slow."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specrt.serve.errors import ApiError

_WITH_BODY = ("POST", "PUT", "PATCH")


class BodyLimit:
    """Reads a request's body before anybody else does, and refuses what is too much.

    Args:
        app: what gets the body, whole.
        most: bytes.
        seconds: in which all of it has to come.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on, or answer that it is refused (413, 408)."""
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._seconds)
        except asyncio.TimeoutError:
            error = ApiError(408, f"body: expected all of it within {self._seconds:g} s")
            await _refuse(error, scope, receive, send)
            return
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        if body is None:  # the client is gone
            return
        rest = [body]

        async def replay() -> Message:
            if rest:
                return {"type": "http.request", "body": rest.pop(), "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        said = Headers(scope=scope).get("content-length", "0")
        if said.isdigit() and int(said) > self._most:
            raise self._too_large()
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._most:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(pieces)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"body: expected at most {self._most} bytes, got more")


async def need_json(request: Request) -> None:
    """Refuse a body that is not said to be JSON: what curl sends of itself is a form.

    Raises:
        ApiError: 415.
    """
    if request.method not in _WITH_BODY:
        return
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    got = repr(given[:100]) if given else "none"
    raise ApiError(
        415,
        f"Content-Type: expected application/json, got {got} (curl: "
        "-H 'Content-Type: application/json')",
    )


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    error.headers = {**(error.headers or {}), "Connection": "close"}  # its rest is not read
    await error.response()(scope, receive, send)
