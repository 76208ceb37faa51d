"""Routes about the server itself: models, health, version, figures."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from specrt import __version__
from specrt.serve.errors import ApiError, JsonResponse
from specrt.serve.metrics import CONTENT_TYPE
from specrt.serve.service import Service, unavailable


class Model(BaseModel):
    """What is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "specrt"
    max_model_len: int
    drafter: str


class Models(BaseModel):
    """All there are: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """That requests are taken."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """Of specrt."""

    version: str


def about_routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The routes, for one service."""
    routes = APIRouter()
    model = Model(
        id=service.name,
        created=service.created,
        max_model_len=service.config.max_positions,
        drafter=type(service.engine.engine.drafter).__name__,
    )

    @routes.get("/v1/models", response_model=Models, responses=errors, summary="What is served")
    async def models() -> Response:
        return JsonResponse(Models(data=[model]).model_dump())

    @routes.get(
        "/v1/models/{name:path}", response_model=Model, responses=errors, summary="One model"
    )
    async def one_model(name: str) -> Response:
        service.check_model(name)
        return JsonResponse(model.model_dump())

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", response_model=Health, responses=errors, summary="Whether it serves")
    async def health() -> Response:
        if service.is_draining:
            raise unavailable()
        try:
            service.engine.require()
        except RuntimeError as error:
            raise ApiError(503, str(error)) from error
        return JsonResponse({"status": "ok"})

    @routes.get("/version", response_model=Version, responses=errors, summary="Of specrt")
    async def version() -> Response:
        return JsonResponse({"version": __version__})

    @routes.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **errors},
        summary="Figures for Prometheus",
    )
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    return routes
