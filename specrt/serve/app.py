"""The application: routes over one engine, and the layers around them."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from specrt import __version__
from specrt.engine.async_engine import AsyncEngine
from specrt.serve.about import about_routes
from specrt.serve.bodies import BodyLimit, need_json
from specrt.serve.chat import chat_routes
from specrt.serve.completions import completion_routes
from specrt.serve.errors import ErrorBody, install
from specrt.serve.guard import Guard, loopback_hosts
from specrt.serve.logs import RequestLog
from specrt.serve.metrics import Metrics
from specrt.serve.options import ServeOptions
from specrt.serve.page_routes import page_routes
from specrt.serve.responses import response_routes
from specrt.serve.service import Service
from specrt.serve.tokens import token_routes

_ABOUT = {
    400: "A field is not what it should be",
    401: "No key, or an unknown one",
    403: "A page of another origin",
    404: "No such model or path",
    408: "The body took too long",
    413: "The body is too large",
    415: "The body is not said to be JSON",
    421: "Not a name of this server",
    500: "The answer failed",
    503: "Too many wait, or the server ends",
    504: "The answer took too long",
}
# Without a type: readers of it take it for a stream's, or for an event's.
_EVENTS = {"description": "Server-sent events, where the request has `stream: true`."}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _ABOUT.items()
}
"""What any route may answer."""


def make_app(engine: AsyncEngine, name: str, options: ServeOptions | None = None) -> FastAPI:
    """An ASGI application that serves an engine.

    Args:
        engine: closed by whoever made it.
        name: what clients call the model.
        options: keys, limits and logs.

    Returns:
        The application; ``app.state.service`` is what its routes share.

    Raises:
        ValueError: keys that cannot be read or used.
    """
    options = options or ServeOptions()
    service = Service(engine, options, name, Metrics(engine.engine, name))
    app = FastAPI(
        title="specrt",
        version=__version__,
        summary="OpenAI's interface over lossless speculative decoding.",
        docs_url=None,  # they would load scripts of others
        redoc_url=None,
    )
    app.state.service = service
    install(app)
    for routes in (chat_routes, completion_routes, response_routes, token_routes, about_routes):
        app.include_router(routes(service, ERRORS), dependencies=[Depends(need_json)])
    if options.page:
        app.include_router(page_routes())
    _add_layers(app, service)
    _describe(app)
    return app


def _add_layers(app: FastAPI, service: Service) -> None:
    """Around the routes, from the inside out."""
    options = service.options
    origins = options.allow_origin or []
    hosts = options.allow_host or (loopback_hosts() if options.is_loopback else None)
    app.add_middleware(BodyLimit, most=options.max_body_bytes, seconds=options.body_seconds)
    app.add_middleware(Guard, keys=options.keys(), hosts=hosts, origins=origins)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    app.add_middleware(RequestLog, metrics=service.metrics)


def _describe(app: FastAPI) -> None:
    """An openapi.json that says what is answered: 400 where FastAPI has 422, events in streams."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            parts = schema["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                parts.pop(name, None)
            for route in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
                content = schema["paths"][route]["post"]["responses"]["200"]["content"]
                content["text/event-stream"] = {"schema": _EVENTS}
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
