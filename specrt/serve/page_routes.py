"""The playground's files."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from specrt.serve.errors import ApiError

FOLDER = Path(__file__).parent / "page"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}


def page_routes() -> APIRouter:
    """Routes of the page; they need no key, what the page calls does."""
    routes = APIRouter()
    for path, (name, kind) in _FILES.items():
        _add(routes, path, FOLDER / name, kind)
    return routes


def _add(routes: APIRouter, path: str, file: Path, kind: str) -> None:
    @routes.get(path, include_in_schema=False)
    async def page_file() -> Response:
        if not file.is_file():
            raise ApiError(404, f"{path}: this installation has no page")
        return Response(file.read_bytes(), headers={"Content-Type": kind, **_HEADERS})
