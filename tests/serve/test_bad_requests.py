"""More than a hundred kinds of bad request: the right status and error, and the server alive."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import specrt
from specrt import builtin
from tests.serve.bad_requests import ALL, MOST_BYTES, Bad
from tests.serve.support import KEY, NAME, Running, http_request, running, send

pytestmark = pytest.mark.skipif(
    not (builtin.target_path() / "config.json").is_file(), reason="the bundled target is not here"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options = {"api_key": [KEY], "max_body_bytes": MOST_BYTES, "body_seconds": 5.0}
    with specrt.load("builtin", progress=False) as engine, running(engine, NAME, **options) as made:
        yield made


def test_there_are_a_hundred_of_different_names() -> None:
    assert len(ALL) >= 100
    assert len({bad.name for bad in ALL}) == len(ALL)


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: bad.name)
def test_refused(server: Running, bad: Bad) -> None:
    answer = send(server.port, bad.request, is_closed=bad.is_closed)
    if not bad.is_http:
        assert answer is None or answer.status in (400, 408, 413, 431)
        return
    assert answer is not None
    assert answer.status in bad.statuses, answer.body[:500]
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.error
    assert error["type"] == "invalid_request_error"
    if bad.param is not None:
        assert error["param"] is not None and error["param"].startswith(bad.param), error
    assert (bad.word or bad.param or "").lower() in error["message"].lower(), error
    assert len(error["message"]) < 1000
    assert KEY not in answer.body.decode()


@pytest.fixture(autouse=True)
def _alive(server: Running) -> Iterator[None]:
    """After each the server is well and nothing of it is left."""
    yield
    answer = send(server.port, http_request("GET", "/health", None))
    assert answer is not None and answer.status == 200
    assert not server.service.open


def test_it_still_answers_right(server: Running) -> None:
    """The last one: what a good request gets after all of these is what it always gets."""
    body = {"model": NAME, "prompt": "Question:", "max_tokens": 8, "temperature": 0}
    request = http_request("POST", "/v1/completions", json.dumps(body).encode())
    first, second = (send(server.port, request) for _ in range(2))
    assert first is not None and second is not None and first.status == 200
    texts = [json.loads(one.body)["choices"][0]["text"] for one in (first, second)]
    assert texts[0] == texts[1] != ""
