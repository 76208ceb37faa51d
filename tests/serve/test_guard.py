"""Keys, names of the server, origins, sizes of bodies: before anything is read or run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from specrt import AsyncEngine
from specrt.serve.app import make_app
from specrt.serve.options import ServeOptions
from tests.serve.support import load_small

BODY = {"prompt": "Once", "max_tokens": 1}


@pytest.fixture(scope="module")
def served() -> Iterator[AsyncEngine]:
    with load_small(max_batch=2) as engine:
        made = AsyncEngine(engine)
        yield made
        made.close()


def client(served: AsyncEngine, name: str = "localhost", **options: Any) -> TestClient:
    app = make_app(served, "tiny", ServeOptions(**options))
    return TestClient(app, base_url=f"http://{name}")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_is_asked_for_wherever_anything_is_told(served: AsyncEngine) -> None:
    calls = client(served, api_key=["one", "two"])
    kept = [
        ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/responses"),
        ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/metrics"),
        ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/nowhere"),
    ]  # fmt: skip
    for method, path in kept:
        for headers in ({}, bearer("three"), bearer(""), {"Authorization": "one"}):
            response = calls.request(method, path, headers=headers)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/version", "/openapi.json"):
        assert calls.get(path).status_code == 200
    for key in ("one", "two"):
        assert calls.post("/v1/completions", json=BODY, headers=bearer(key)).status_code == 200
        assert calls.get("/metrics", headers=bearer(key)).status_code == 200


def test_keys_of_a_file(served: AsyncEngine, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n  two  \n")
    assert ServeOptions(api_key=["zero"], api_key_file=str(file)).keys() == ("zero", "one", "two")
    calls = client(served, api_key_file=str(file))
    assert calls.get("/v1/models", headers=bearer("two")).status_code == 200
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="api_key_file: expected keys"):
        client(served, api_key_file=str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="api_key_file: .*keys cannot be read: it is not UTF-8"):
        client(served, api_key_file=str(file))
    with pytest.raises(ValueError, match="api_key: expected printable"):
        client(served, api_key=["a key"])


def test_each_key_has_its_own_prefixes(
    served: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    salts: list[str] = []
    stream = served.stream

    def noted(prompts: Any, params: Any, draft: Any) -> Any:
        salts.append(params.cache_salt)
        return stream(prompts, params, draft)

    monkeypatch.setattr(served, "stream", noted)
    calls = client(served, api_key=["one", "two"])
    for key, more in (("one", {}), ("one", {}), ("two", {}), ("two", {"cache_salt": "mine"})):
        body = {**BODY, **more}
        assert calls.post("/v1/completions", json=body, headers=bearer(key)).status_code == 200
    assert salts[0] == salts[1] and len(set(salts)) == 3
    assert not any("one" in salt or "two" in salt for salt in salts)
    assert salts[0] == hashlib.sha256(b"specrt prefix cache:one").hexdigest()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_names_of_this_machine(served: AsyncEngine, host: str) -> None:
    assert client(served).get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "[::1", "1.2.3.4"])
def test_other_names_are_refused_on_loopback(served: AsyncEngine, host: str) -> None:
    response = client(served).get("/health", headers={"Host": host})
    assert response.status_code == 421
    assert response.json()["error"]["code"] == "unknown_host"


def test_names_that_are_allowed(served: AsyncEngine) -> None:
    assert client(served, "ai.example", allow_host=["ai.example"]).get("/health").is_success
    assert client(served, "any.example", host="0.0.0.0").get("/health").is_success


def test_pages_of_other_origins_may_not_call(served: AsyncEngine) -> None:
    other = {"Origin": "https://evil.example"}
    response = client(served).post("/v1/completions", json=BODY, headers=other)
    assert response.status_code == 403
    for none in ("null", "http://[", "x"):
        assert client(served).get("/health", headers={"Origin": none}).status_code == 403
    own = {"Origin": "http://localhost"}
    assert client(served).post("/v1/completions", json=BODY, headers=own).status_code == 200
    calls = client(served, allow_origin=["https://good.example"], api_key=["one"])
    good = {"Origin": "https://good.example"}
    asked = {**good, "Access-Control-Request-Method": "POST"}
    response = calls.options("/v1/completions", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://good.example"
    answer = calls.post("/v1/completions", json=BODY, headers=good | bearer("one"))
    assert answer.headers["access-control-allow-origin"] == "https://good.example"
    assert calls.get("/v1/models", headers=other | bearer("one")).status_code == 403


def test_large_bodies(served: AsyncEngine) -> None:
    calls = client(served, max_body_bytes=100)
    response = calls.post("/v1/completions", json={"prompt": "a" * 100})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    in_pieces = (b"x" * 40 for _ in range(4))  # without a length
    assert calls.post("/v1/completions", content=in_pieces).status_code == 413
    assert calls.post("/v1/completions", json=BODY).status_code == 200


def test_limits_of_prompts_and_answers(served: AsyncEngine) -> None:
    calls = client(served, max_prompt_tokens=3, max_output_tokens=5, max_choices=2)

    def status(**body: Any) -> tuple[int, str | None]:
        response = calls.post("/v1/completions", json={**BODY, **body})
        return response.status_code, response.json().get("error", {}).get("param")

    assert status(prompt=[5, 6, 7]) == (200, None)
    assert status(prompt=[5, 6, 7, 8]) == (400, "prompt")
    assert status(max_tokens=6) == (400, "max_tokens")
    assert status(n=3) == (400, "n")
    assert status(prompt=["a", "b", "c"]) == (400, "n")
    body = {"prompt": "a", "ignore_eos": True}
    answer = calls.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 5  # not the sixteen of who says nothing


def test_the_page_is_open_and_strict(served: AsyncEngine) -> None:
    response = client(served, api_key=["one"]).get("/")
    assert response.status_code in (200, 404)  # an installation may come without it
    if response.is_success:
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert response.headers["x-content-type-options"] == "nosniff"
    assert client(served, page=False).get("/").status_code == 404


@pytest.mark.parametrize(
    ("options", "name"),
    [({"port": 70000}, "port"), ({"max_choices": 0}, "max_choices"), ({"drain_seconds": -1}, "dr")],
)
def test_options_out_of_range(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ServeOptions(**options)
