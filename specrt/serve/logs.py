"""One line a request, with an id that the client may choose, and nothing of what was said."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specrt.serve.errors import CLIENT_GONE, ApiError

if TYPE_CHECKING:
    from specrt.serve.metrics import Metrics

LOG = logging.getLogger("specrt.serve")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, message, and what it has besides."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        said: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


class PlainLines(logging.Formatter):
    """A record as a line for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = getattr(record, "fields", {})
        shown = " ".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
        return f"{super().format(record)} {shown}".rstrip()


class RequestLog:
    """Gives each request its id, and writes down how it ended; the outermost layer.

    Args:
        app: what answers.
        metrics: count answers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on and write it down."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope["specrt.request_id"] = name
        started, state = time.monotonic(), {"status": 0}

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = name
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except Exception:
            LOG.exception("a request failed", extra={"fields": {"request": name}})
            if not state["status"]:
                error = ApiError(500, "the server failed; its log says more")
                await error.response()(scope, receive, tell)
        finally:
            self._write(scope, name, state["status"] or CLIENT_GONE, time.monotonic() - started)

    def _write(
        self, scope: MutableMapping[str, Any], name: str, status: int, seconds: float
    ) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.count_http(scope["method"], route, status)
        client = scope.get("client")
        fields = {
            "request": name,
            "method": scope["method"],
            "path": route if route != "other" else scope["path"][:200],
            "status": status,
            "ms": round(seconds * 1000, 1),
            "client": client[0] if client else None,
            **scope.get("specrt.figures", {}),
        }
        LOG.info("request", extra={"fields": fields})


def set_up(is_json: bool) -> None:
    """Write the server's log to stderr; what libraries say goes there too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if is_json else PlainLines())
    for name in ("specrt", "uvicorn"):
        log = logging.getLogger(name)
        log.handlers[:] = [handler]
        log.setLevel(logging.INFO)
        log.propagate = False
