"""What the official client hides: headers, frames, bytes."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

import pytest

from tests.serve.conformance.conftest import ANSWER_SECONDS, Endpoint

PROMPT = "Question: Ann has 5 coins and finds 6. How many has she?\nAnswer:"
ASKED = [{"role": "user", "content": "Ann has 5 coins and finds 6. How many has she?"}]


def ask(
    server: Endpoint, method: str, path: str, body: Any = None, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """One request: what was answered, and the whole body."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=ANSWER_SECONDS)
    fields = {"Authorization": f"Bearer {server.api_key}", **headers}
    if body is not None:
        fields.setdefault("Content-Type", "application/json")
    data = None if body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, data, fields)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def post(server: Endpoint, route: str, **body: Any) -> tuple[http.client.HTTPResponse, bytes]:
    """One request with the server's model."""
    return ask(server, "POST", f"/v1/{route}", {"model": server.model, **body})


def frames(body: bytes) -> list[bytes]:
    """The events' data, each checked to be one; comments are left out."""
    assert body.endswith(b"\n\n")
    events = body[:-2].split(b"\n\n")
    found = []
    for event in events:
        if event.startswith(b":"):
            continue
        assert event.startswith(b"data: ") and b"\n" not in event, event
        found.append(event[6:])
    return found


def parsed(body: bytes) -> list[Mapping[str, Any]]:
    """The events of a stream that ended well."""
    *events, last = frames(body)
    assert last == b"[DONE]"
    return [json.loads(event) for event in events]


def test_a_stream_is_server_sent_events(server: Endpoint) -> None:
    answer, body = post(server, "completions", prompt=PROMPT, max_tokens=8, stream=True)
    assert answer.status == 200
    assert (answer.getheader("Content-Type") or "").startswith("text/event-stream")
    assert body.count(b"data: [DONE]") == 1
    events = parsed(body)
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1


@pytest.mark.extension
def test_proxies_are_told_not_to_hold_a_stream_back(server: Endpoint) -> None:
    answer, _ = post(server, "completions", prompt=PROMPT, max_tokens=2, stream=True)
    assert answer.getheader("X-Accel-Buffering") == "no"
    assert "no-cache" in (answer.getheader("Cache-Control") or "")


def test_a_chat_begins_with_its_role(server: Endpoint) -> None:
    _, body = post(server, "chat/completions", messages=ASKED, max_tokens=8, stream=True)
    events = parsed(body)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[0]["choices"][0]["finish_reason"] is None
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.extension
def test_every_choice_begins_with_its_role(server: Endpoint) -> None:
    _, body = post(
        server, "chat/completions", messages=ASKED, max_tokens=4, n=3, seed=1, stream=True
    )
    roles = [
        (choice["index"], choice["delta"].get("role"))
        for event in parsed(body)
        for choice in event["choices"]
    ]
    for index in range(3):
        of_choice = [role for number, role in roles if number == index]
        assert of_choice[0] == "assistant" and not any(of_choice[1:])


def test_usage_is_told_only_if_asked(server: Endpoint) -> None:
    _, body = post(server, "completions", prompt=PROMPT, max_tokens=4, stream=True)
    assert all(not event.get("usage") for event in parsed(body))
    _, body = post(
        server,
        "completions",
        prompt=PROMPT,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    *events, last = parsed(body)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert all(not event.get("usage") for event in events)


def test_every_event_is_utf8_and_they_are_the_whole(server: Endpoint) -> None:
    """No event ends within a character, though tokens do. Bytes are forced by biases on all
    tokens but a few, so that any model says something strange."""
    options: dict[str, Any] = {
        "prompt": "Ünïcödé 日本語 🙂🙂🙂 🙂🙂🙂",
        "max_tokens": 24,
        "temperature": 2.0,
        "seed": 5,
    }
    _, whole = post(server, "completions", **options)
    _, body = post(server, "completions", stream=True, **options)
    for event in frames(body):
        event.decode("utf-8")  # strictly
    text = "".join(e["choices"][0]["text"] for e in parsed(body) if e["choices"])
    assert text == json.loads(whole)["choices"][0]["text"]


@pytest.mark.extension
def test_characters_of_several_tokens_come_whole(server: Endpoint) -> None:
    """Held back until they are complete, so no chunk has a replacement character in place of a
    part of one."""
    prompt = "🙂" * 12
    _, tokens = ask(server, "POST", "/tokenize", {"model": server.model, "prompt": "🙂"})
    ids = json.loads(tokens)["tokens"]
    allowed = sorted(set(ids))
    _, body = post(
        server,
        "completions",
        prompt=prompt,
        max_tokens=24,
        temperature=0,
        stream=True,
        allowed_token_ids=allowed,
        ignore_eos=True,
    )
    texts = [e["choices"][0]["text"] for e in parsed(body) if e["choices"]]
    _, whole = post(
        server,
        "completions",
        prompt=prompt,
        max_tokens=24,
        temperature=0,
        allowed_token_ids=allowed,
        ignore_eos=True,
    )
    assert "".join(texts) == json.loads(whole)["choices"][0]["text"]


@pytest.mark.extension
def test_request_ids(server: Endpoint) -> None:
    """A client's own comes back; without one there is one, and never the same."""
    first, _ = ask(server, "GET", "/v1/models")
    second, _ = ask(server, "GET", "/v1/models")
    ids = [one.getheader("X-Request-Id") for one in (first, second)]
    assert all(ids) and ids[0] != ids[1]
    own, _ = ask(server, "GET", "/v1/models", **{"X-Request-Id": "mine-1"})
    assert own.getheader("X-Request-Id") == "mine-1"
    evil, _ = ask(server, "GET", "/v1/models", **{"X-Request-Id": "a" * 5000})
    assert len(evil.getheader("X-Request-Id") or "") <= 200


@pytest.mark.extension
def test_a_model_is_listed_with_its_context(server: Endpoint) -> None:
    _, body = ask(server, "GET", "/v1/models")
    assert json.loads(body)["data"][0]["max_model_len"] > 0


@pytest.mark.extension
def test_tokens_and_back(server: Endpoint) -> None:
    _, body = ask(server, "POST", "/tokenize", {"model": server.model, "prompt": PROMPT})
    told = json.loads(body)
    assert told["count"] == len(told["tokens"]) and told["max_model_len"] > 0
    _, body = ask(server, "POST", "/detokenize", {"model": server.model, "tokens": told["tokens"]})
    assert json.loads(body)["prompt"].endswith(PROMPT)


@pytest.mark.extension
def test_health_metrics_and_version(server: Endpoint) -> None:
    health, _ = ask(server, "GET", "/health")
    assert health.status == 200
    _, body = ask(server, "GET", "/version")
    assert json.loads(body)["version"]
    metrics, body = ask(server, "GET", "/metrics")
    assert metrics.status == 200
    assert (metrics.getheader("Content-Type") or "").startswith("text/plain")
    text = body.decode()
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "spec_decode_num_drafts_total",
        "spec_decode_num_accepted_tokens_total",
    ):
        assert re.search(rf"^(vllm|specrt):{name}\b", text, re.M), name


@pytest.mark.extension
@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/tokenize", "/v1/completions"])
def test_the_key_is_asked_for(server: Endpoint, path: str) -> None:
    if server.api_key == "none":
        pytest.skip("this server asks for no key")
    method = "GET" if path in ("/metrics", "/v1/models") else "POST"
    body = None if method == "GET" else {"prompt": "a"}
    for header in ("", "Bearer", "Bearer wrong", f"Basic {server.api_key}", server.api_key[:-1]):
        answer, told = ask(server, method, path, body, Authorization=header)
        assert answer.status == 401, header
        assert json.loads(told)["error"]["message"]


@pytest.mark.extension
def test_leaving_ends_the_request(server: Endpoint) -> None:
    """A client that is gone holds no place in the batch."""
    running = re.compile(r"num_requests_running\{[^}]*\} ([0-9.]+)")

    def num_running() -> float:
        _, body = ask(server, "GET", "/metrics")
        found = running.search(body.decode())
        assert found is not None
        return float(found[1])

    body = {
        "model": server.model, "prompt": PROMPT, "max_tokens": 1500, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    data = json.dumps(body).encode()
    with socket.create_connection((server.host, server.port), timeout=ANSWER_SECONDS) as made:
        made.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n"
            + f"Authorization: Bearer {server.api_key}\r\n".encode()
            + f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        assert made.recv(4096).startswith(b"HTTP/1.1 200")
        made.recv(4096)
        assert num_running() >= 1
    end = time.monotonic() + 20
    while num_running() > 0 and time.monotonic() < end:
        time.sleep(0.02)
    assert num_running() == 0


def test_a_connection_serves_several_requests(server: Endpoint) -> None:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=ANSWER_SECONDS)
    connection.connect()
    made = connection.sock
    headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
    for _ in range(2):
        body = {"model": server.model, "prompt": PROMPT, "max_tokens": 2, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        assert parsed(answer.read())
        assert connection.sock is made
    connection.close()


def test_a_body_in_pieces(server: Endpoint) -> None:
    """Chunked, of one byte each at its beginning."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=ANSWER_SECONDS)
    headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
    data = json.dumps({"model": server.model, "prompt": PROMPT, "max_tokens": 2}).encode()
    pieces = [data[i : i + 1] for i in range(10)] + [data[10:]]
    connection.request("POST", "/v1/completions", iter(pieces), headers, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 200 and json.loads(answer.read())["choices"]
    connection.close()
