"""What openapi.json says, against what the server does, by schemathesis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import specrt
from specrt import builtin
from tests.serve.support import KEY, NAME, Running, http_request, running, send

pytestmark = pytest.mark.skipif(
    not (builtin.target_path() / "config.json").is_file(), reason="the bundled target is not here"
)

POSTED = [
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize",
]  # fmt: skip
GOTTEN = ["/v1/models", "/v1/models/{name}", "/health", "/version", "/metrics"]
_CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Answers of four tokens, so that examples cost little."""
    with (
        specrt.load("builtin", "none", progress=False) as engine,
        running(engine, NAME, api_key=[KEY], max_output_tokens=4, max_choices=4) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def told(server: Running) -> dict[str, Any]:
    """openapi.json."""
    answer = send(server.port, http_request("GET", "/openapi.json", None))
    assert answer is not None and answer.status == 200
    return dict(json.loads(answer.body))


@pytest.fixture(scope="module")
def schema(told: dict[str, Any], server: Running) -> BaseSchema:
    made = schemathesis.openapi.from_dict(told)
    made.config.update(base_url=f"http://127.0.0.1:{server.port}")
    return made


def test_it_is_valid(schema: BaseSchema, told: dict[str, Any]) -> None:
    schema.validate()
    assert told["openapi"].startswith("3.")
    assert told["info"]["version"] == specrt.__version__


def test_every_operation_is_tried(told: dict[str, Any]) -> None:
    by_method = {
        method: {path for path, operations in told["paths"].items() if method in operations}
        for method in ("get", "post")
    }
    assert by_method["post"] >= set(POSTED)
    known = {*POSTED, *GOTTEN}
    assert by_method["get"] | by_method["post"] <= known | {"/load", "/ping"}


def test_it_names_every_error(told: dict[str, Any]) -> None:
    for path, operations in told["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            assert "422" not in answers, path
            assert "401" in answers or path in ("/health", "/version", "/ping"), path


def try_all(schema: BaseSchema, path: str, method: str, count: int) -> None:
    """Call an operation by so many made up requests, of its form and not."""

    @seed(1)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(schema[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def positive(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = NAME
        case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, checks=_CHECKS)

    positive()


@pytest.mark.parametrize("path", POSTED)
def test_posted(schema: BaseSchema, path: str) -> None:
    try_all(schema, path, "POST", 8)


@pytest.mark.parametrize("path", GOTTEN)
def test_gotten(schema: BaseSchema, path: str) -> None:
    try_all(schema, path, "GET", 3)


@pytest.mark.slow
@pytest.mark.parametrize("path", POSTED)
def test_posted_at_length(schema: BaseSchema, path: str) -> None:
    try_all(schema, path, "POST", 400)
