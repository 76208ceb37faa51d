"""Clients that go, queues that are full, time that is over, signals, figures and logs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from specrt import Engine, builtin
from specrt.cli import main
from specrt.serve.logs import JsonLines, PlainLines
from tests.checkpoints import edit_config
from tests.serve.support import (
    QUESTION,
    Running,
    is_at_rest,
    load_small,
    raw,
    running,
    until,
)

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {
    "messages": QUESTION, "temperature": 0, "max_tokens": 1500, "ignore_eos": True,
    "speculative": {"enabled": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load_small(max_batch=1, max_waiting=1) as made:
        yield made


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with running(engine, body_seconds=0.5, ping_seconds=0.002) as made:
        yield made


def asked(**more: Any) -> bytes:
    return json.dumps({**LONG, **more}).encode()


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    data = b""
    while wanted not in data:
        piece = connection.recv(65536)
        assert piece, data
        data += piece
    return data


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_goes_ends_its_request(server: Running, is_streamed: bool) -> None:
    before = server.figure("vllm:request_success_total")
    connection = raw(server, asked(stream=is_streamed))
    until(lambda: server.engine.stats.num_running == 1)
    if is_streamed:
        read_until(connection, b'"content":')
    connection.close()
    until(lambda: is_at_rest(server.engine))
    until(lambda: server.figure("vllm:request_success_total") == before + 1)
    assert server.figure("vllm:num_requests_running") == 0


@pytest.mark.parametrize("path", ["/health", "/", "/page.js"])
def test_head_is_get_without_a_body(server: Running, path: str) -> None:
    got, head = server.client.get(path), server.client.head(path)
    assert got.status_code == head.status_code == 200
    assert got.content and not head.content
    for name in ("content-type", "content-length"):
        assert got.headers[name] == head.headers[name]


def test_a_full_queue_says_when_to_come_again(server: Running) -> None:
    first = raw(server, asked(stream=True))
    until(lambda: server.engine.stats.num_running == 1)
    two = server.chat(n=2)
    second = raw(server, asked(stream=True))
    until(lambda: server.engine.stats.num_waiting == 1)
    three = server.chat()
    for response in (two, three):
        assert response.status_code == 503, response.text
        assert response.json()["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) > 0
    first.close()
    second.close()
    until(lambda: is_at_rest(server.engine))


def test_a_body_that_does_not_come(server: Running) -> None:
    connection = raw(server, b"{", **{"Content-Length": "100"})
    assert b" 408 " in read_until(connection, b"request_timeout")
    connection.close()


def test_comments_while_nothing_comes(server: Running) -> None:
    with raw(server, asked(stream=True, max_tokens=20)) as connection:
        text = read_until(connection, b"[DONE]")
    assert b": ping\n\n" in text


def test_time_that_is_over(engine: Engine) -> None:
    with running(engine, request_seconds=0.2) as server:
        response = server.post(CHAT, **LONG)
        assert response.status_code == 504
        assert response.json()["error"]["type"] == "server_error"
        *_, error, done = server.events(CHAT, **LONG)
        assert error["error"]["code"] == "timeout" and done == "[DONE]"
        until(lambda: is_at_rest(engine))


def test_the_log_counts_what_a_cut_answer_said(engine: Engine) -> None:
    log, lines = logging.getLogger("specrt.serve"), Lines(JsonLines())
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(lines)
    try:
        with running(engine, request_seconds=0.5) as server:
            before = server.figure("vllm:generation_tokens_total")
            server.events(CHAT, **LONG)
            count = server.figure("vllm:generation_tokens_total") - before
    finally:
        log.removeHandler(lines)
        log.setLevel(level)
    (said,) = (
        json.loads(line) for line in lines.lines if '"ended":"timeout"' in line.replace(" ", "")
    )
    assert said["output_tokens"] == count > 0


def test_a_failing_engine_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(engine) as server:
        monkeypatch.setattr(engine, "step", lambda: 1 / 0)
        assert server.chat().status_code == 503
        assert server.chat().status_code == 503
        assert server.client.get("/health").status_code == 503
        monkeypatch.undo()
    engine.step()


def test_a_signal_lets_running_requests_end(engine: Engine) -> None:
    with running(engine) as server:
        connection = raw(server, asked(stream=True, max_tokens=60))
        until(lambda: engine.stats.num_running == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.client.get("/health").status_code == 503)
        refused = server.chat()
        assert refused.status_code == 503 and "shutting down" in refused.text
        assert b'"finish_reason":"length"' in read_until(connection, b"[DONE]")
        connection.close()
        until(lambda: server.server.should_exit)


def test_a_second_signal_ends_them(engine: Engine) -> None:
    with running(engine) as server:
        connection = raw(server, asked(stream=True))
        read_until(connection, b'"content":')
        for _ in range(2):
            server.server.handle_exit(signal.SIGINT, None)
        assert b"shut down" in read_until(connection, b"[DONE]")
        connection.close()
    until(lambda: is_at_rest(engine))


def test_figures_by_the_peers_names(engine: Engine) -> None:
    with running(engine) as server:
        answer = server.ok(CHAT, messages=QUESTION, temperature=0, max_tokens=20)
        server.post(CHAT, messages=[])
        usage, told = answer["usage"], answer["x_specrt"]
        want = {
            "vllm:prompt_tokens_total": usage["prompt_tokens"],
            "vllm:generation_tokens_total": 20,
            "vllm:request_success_total": 1,
            "vllm:spec_decode_num_draft_tokens_total": told["drafted"],
            "vllm:spec_decode_num_accepted_tokens_total": told["accepted"],
            "vllm:spec_decode_num_accepted_tokens_per_pos_total": told["accepted"],
            "vllm:time_to_first_token_seconds_count": 1,
            "vllm:e2e_request_latency_seconds_count": 1,
            "vllm:inter_token_latency_seconds_count": told["rounds"] - 1,
        }
        assert {name: server.figure(name) for name in want} == want
        text = server.client.get("/metrics").text
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 1.0' in text
    assert 'http_requests_total{handler="/v1/chat/completions",method="POST",status="400"}' in text
    for name in ("num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total"):
        assert f'vllm:{name}{{model_name="tiny"}}' in text
    kinds = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds)), "a figure stands twice"


class Lines(logging.Handler):
    """What a log said."""

    def __init__(self, form: logging.Formatter) -> None:
        super().__init__()
        self.form, self.lines = form, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.form.format(record))


@pytest.mark.parametrize("logs_prompts", [False, True])
def test_logs_have_ids_and_no_prompt_unless_asked(engine: Engine, logs_prompts: bool) -> None:
    log = logging.getLogger("specrt.serve")
    handlers = [Lines(JsonLines()), Lines(PlainLines())]
    level = log.level
    log.setLevel(logging.INFO)
    for handler in handlers:
        log.addHandler(handler)
    try:
        with running(engine, log_prompts=logs_prompts) as server:
            secret = [{"role": "user", "content": "Xylophone"}]
            body = {"messages": secret, "max_tokens": 2}
            headers = {"X-Request-Id": "mine-1"}
            response = server.client.post(CHAT, json=body, headers=headers)
            assert response.headers["x-request-id"] == "mine-1"
            assert response.json()["id"] == "chatcmpl-mine-1"
            bad = {"X-Request-Id": "a b\tc"}
            other = server.client.post(CHAT, json={"messages": "Xylophone"}, headers=bad)
            assert len(other.headers["x-request-id"]) == 32
            server.client.post(CHAT, json={**body, "stream": True}).read()
    finally:
        for handler in handlers:
            log.removeHandler(handler)
        log.setLevel(level)
    said = [json.loads(line) for line in handlers[0].lines if '"request":' in line]
    assert said[0]["request"] == "mine-1" and said[0]["status"] == 200
    assert said[0]["output_tokens"] == 2 and said[1]["status"] == 400
    assert said[2]["ended"] == "length", "nobody left before the end"
    for handler in handlers:
        assert any("Xylophone" in line for line in handler.lines) is logs_prompts


def test_the_command_serves_and_ends_with_its_signal() -> None:
    command = [sys.executable, "-m", "specrt", "serve", "builtin", "--port", "0", "--json-logs"]
    environment = {**os.environ, "SPECRT_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("specrt: serving builtin at http://127.0.0.1:")
        url = line.split()[-1]
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        body = {"prompt": "Once", "max_tokens": 3}
        answer = httpx2.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.json()["model"] == "builtin"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert "secret" not in log and '"status": 401' in log


def test_an_address_that_is_taken_is_said_before_anything_is_loaded() -> None:
    from specrt.serve.options import ServeOptions
    from specrt.serve.running import listen

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: 127.0.0.1:{port} cannot be listened at"):
            listen(ServeOptions(port=port))
    with pytest.raises(ValueError, match="host: nowhere.invalid cannot be listened at"):
        listen(ServeOptions(host="nowhere.invalid"))


PORT_IS_TAKEN = "port: 127.0.0.1:{port} cannot be listened at"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], PORT_IS_TAKEN),
        (["no/such-target.gguf"], "no/such-target.gguf"),
        (["--drafter", "no-such"], "drafter: expected none, auto"),
        (["--drafter", "./no-such"], "no-such: no such directory"),
        (["--drafter", "OTHERS"], "made for another target"),
        (["--lora", "./no-such"], "no-such"),
        (["--hot-tokens", "no-such.json"], "hot_tokens: no such file: no-such.json"),
        (["--device", "tpu"], "device: expected 'cpu'"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--draft-window", "0"], "draft_window: expected"),
        (["--dtype", "int3"], "dtype: expected auto or one of"),
        (["--quantize", "int3"], "quantize: expected"),
        (["--controller", "fixed-x"], "controller: expected"),
        (["--draft-weights", "int3"], "draft_weights: expected"),
        (["--max-batch", "0"], "max_batch: expected at least 1"),
        (["--api-key-file", "no-such"], "api_key_file: no-such cannot be read: No such file"),
        (["--api-key", ""], "api_key: expected a key, got an empty one"),
    ],
)
def test_what_options_tell_comes_first_then_the_port_then_the_model(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SPECRT_API_KEY", raising=False)
    if "OTHERS" in options:
        shutil.copytree(builtin.drafter_paths("builtin")["fspad"], tmp_path / "others")
        edit_config(tmp_path / "others", target={"name": "other", "fingerprint": "0"})
        options = ["--drafter", str(tmp_path / "others")]
    loaded: list[object] = []
    monkeypatch.setattr("specrt.loading.load", lambda *given, **named: loaded.append(given))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", *options, "--port", str(port)]) == 2
    assert message.format(port=port) in capsys.readouterr().err
    assert not loaded


@pytest.mark.parametrize("given", ["", " "])
def test_a_key_that_did_not_come_opens_nothing(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECRT_API_KEY", given)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 2
        assert "SPECRT_API_KEY: expected a key, got an empty one" in capsys.readouterr().err
        assert main(["serve", "--port", port, "--api-key", "a"]) == 2
    assert "cannot be listened at" in capsys.readouterr().err


def test_no_thread_is_left(engine: Engine) -> None:
    before = set(threading.enumerate())
    with running(engine) as server:
        server.chat(max_tokens=1)
        names = {thread.name for thread in set(threading.enumerate()) - before}
        assert "specrt-stepper" in names
    assert set(threading.enumerate()) <= before
