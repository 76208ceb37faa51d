"""The playground's files."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from specrt.serve.errors import ApiError

FOLDER = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"  # no text is parsed as HTML
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""Of each of its files."""
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
PAGE_FILES = {
    "/": "index.html",
    "/page.css": "page.css",
    **{f"/{name}.js": f"{name}.js" for name in ("page", "answer", "stream", "tokens", "tree")},
}
"""The page's paths and their files."""


def page_routes() -> APIRouter:
    """Routes of the page; they need no key, what the page calls does."""
    routes = APIRouter()
    for path, name in PAGE_FILES.items():
        _add(routes, path, FOLDER / name)
    return routes


def _add(routes: APIRouter, path: str, file: Path) -> None:
    kind = f"{_KINDS[file.suffix]}; charset=utf-8"

    @routes.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def page_file() -> Response:
        if not file.is_file():
            raise ApiError(404, f"{path}: this installation has no page")
        return Response(file.read_bytes(), headers={"Content-Type": kind, **PAGE_HEADERS})
