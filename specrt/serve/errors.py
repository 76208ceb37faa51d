"""Errors in OpenAI's form, whatever refused a request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from specrt.types import QueueFullError

_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    421: "unknown_host",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}
_RETRY_SECONDS = 1
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_UNREADABLE = "There was an error parsing the body"
"""FastAPI's words for a body that fails its parser in another way than by its grammar (depth)."""
CLIENT_GONE = 499
"""nginx's status of what nobody waited for."""
# How our own errors begin: the field they are about, as they know it.
_FIELD = re.compile(r"^([a-z_]\w*(?:\[[^\]]*\])*(?:\.\w+)*)(?:, \w+)*: ")
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "structured": "structured_outputs",
    "depth": "speculative",
    "total_tokens": "speculative",
    "prompt_logprobs": "logprobs",
    "options": "chat_template_kwargs",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


class ApiError(HTTPException):
    """A request that is not answered, and why.

    Args:
        status: of HTTP.
        message: for people.
        param: the field it is about.
        code: for programs; by the status if None.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code or _CODES.get(status, "error")

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same about a field that is called otherwise."""
        for name, other in names.items():
            if self.param is not None and re.match(rf"{re.escape(name)}(?!\w)", self.param):
                param = other + self.param[len(name) :]
                message = self.detail.replace(self.param, param, 1)
                return ApiError(self.status_code, message, param, self.code, self.headers)
        return self

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        detail = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": detail}

    def response(self) -> Response:
        """The whole answer."""
        return JsonResponse(self.body(), self.status_code, self.headers)


class JsonResponse(Response):
    """JSON of whatever text: what is no character becomes a question mark."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)


def to_json(content: Any) -> bytes:
    """JSON as UTF-8, without needless spaces."""
    return _JSON.encode(content).encode("utf-8", "replace")


def refused(error: ValueError | TypeError) -> ApiError:
    """The answer to what the engine refuses: its message begins with the field's name."""
    message, param = str(error), None
    found = _FIELD.match(message)
    if found:
        name, rest = found[1], message[found.end() :]
        head = re.split(r"[\[.]", name)[0]
        param = _NAMES.get(head, name)
        message = f"{param}: {rest}".replace("max_new_tokens", "max_tokens")
    code = "context_length_exceeded" if "leave no room in the context" in message else None
    return ApiError(400, message, param, code)


def queue_full(error: QueueFullError) -> ApiError:
    """The answer where too many wait."""
    message = "too many requests wait; try again later"
    return ApiError(503, message, code="queue_full", headers={"Retry-After": str(_RETRY_SECONDS)})


def field_path(location: Sequence[Any]) -> str | None:
    """A field's place as one would write it: ``messages[0].content``."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"\w+", str(part)):  # else the name of a type that was tried
            path += f".{part}" if path else str(part)
    return path or None


def _validation(error: RequestValidationError) -> ApiError:
    first = _plainest(error.errors())
    place, kind = list(first["loc"]), first["type"]
    where = place[1:] if place and place[0] in ("body", "query", "path", "header") else place
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"body: expected JSON ({reason})", code="invalid_json")
    param = field_path(_without_types(where))
    if kind == "extra_forbidden":
        return ApiError(400, f"{param}: no such field here", param, "unknown_parameter")
    if kind == "missing":
        message = f"{param or 'body'}: expected, but missing"
        return ApiError(400, message, param, "missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param or 'body'}: {message[:500]}", param, "invalid_value")


def _plainest(errors: Sequence[Any]) -> Any:
    """Of all errors the one that goes deepest: of a union's members that which fits best, one whose
    type is right before others."""
    return max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))


def _without_types(location: Sequence[Any]) -> list[Any]:
    """A place without the names of a union's members, which pydantic puts into it."""
    return [
        part
        for part in location
        if isinstance(part, int)
        or not re.match(r"^(str|int|float|bool|list|dict|constrained|[A-Z]\w*)(\b|\[|-)", str(part))
    ]


def install(app: FastAPI) -> None:
    """Let all of an app's errors have this form."""

    async def on_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError), "registered for it"
        return _validation(error).response()

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for it"
        if error.detail == _UNREADABLE:
            error = ApiError(400, "body: expected JSON that can be read", code="invalid_json")
        elif not isinstance(error, ApiError):
            error = ApiError(error.status_code, str(error.detail), headers=error.headers)
        return error.response()

    async def on_gone(_: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def on_any(_: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says more").response()

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientDisconnect, on_gone)
    app.add_exception_handler(Exception, on_any)
