"""Who may call: names of the server, origins of pages, keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from specrt.serve.errors import ApiError
from specrt.serve.page_routes import PAGE_FILES

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OPEN = (*PAGE_FILES, "/health", "/version", "/openapi.json", "/favicon.ico")


class Guard:
    """Refuses calls before anything of them is read.

    A browser that was sent to this machine by somebody else's name (DNS rebinding) is refused by
    its ``Host``, a page of another origin by its ``Origin``: its call would be answered even where
    it may not read the answer.

    Args:
        app: what is guarded.
        keys: one of which a call has to give; none: nobody has to.
        hosts: names by which the server may be called; None: any.
        origins: of pages that may call, ``*`` is any; the server's own page may always.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        hosts: Sequence[str] | None,
        origins: Sequence[str],
    ) -> None:
        self._app = app
        self._keys = [(key.encode(), _salt_of(key)) for key in keys]
        self._hosts, self._origins = hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on, or answer that it is refused."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        error = self._refusal(scope, headers)
        if error is not None:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if not host:
            close = {"Connection": "close"}
            return ApiError(400, "host: expected a Host header, got none", headers=close)
        if self._hosts is not None and _name_of(host) not in self._hosts:
            return ApiError(421, "host: expected one of this server's names; see --allow-host")
        origin = headers.get("origin")
        if origin is not None and not self._is_known(origin, host):
            return ApiError(403, "origin: pages of other origins may not call; see --allow-origin")
        if not self._keys or scope["path"] in _OPEN:
            return None
        given = headers.get("authorization", "")
        scheme, _, token = given.partition(" ")
        salt = self._salt(token.strip()) if scheme.lower() == "bearer" else None
        if salt is None:
            reason = "expected 'Authorization: Bearer KEY'" if not given else "the key is not known"
            challenge = {"WWW-Authenticate": "Bearer"}
            return ApiError(401, f"api key: {reason}", headers=challenge)
        scope["specrt.salt"] = salt
        return None

    def _is_known(self, origin: str, host: str) -> bool:
        try:
            is_own = urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:  # no address at all
            return False
        return is_own or "*" in self._origins or origin in self._origins

    def _salt(self, token: str) -> str | None:
        """Of the key that was given; all are compared, each in constant time."""
        found, given = None, token.encode()
        for key, salt in self._keys:
            if hmac.compare_digest(key, given):
                found = salt
        return found


def loopback_hosts() -> tuple[str, ...]:
    """The names of this machine for itself."""
    return _LOOPBACK


def _name_of(host: str) -> str:
    """A ``Host`` without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _salt_of(key: str) -> str:
    return hashlib.sha256(b"specrt prefix cache:" + key.encode()).hexdigest()
