"""``/v1/chat/completions``: what it answers is the engine's own text, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.support import QUESTION, Running, load_small, running

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with load_small(max_batch=4) as engine, running(engine) as made:
        yield made


def own(server: Running, **options: Any) -> Any:
    return server.engine.generate(QUESTION, **options)


def test_an_answer_is_the_engines(server: Running) -> None:
    want = own(server, max_new_tokens=20)
    got = server.ok(CHAT, messages=QUESTION, temperature=0, max_tokens=20, model="tiny")
    assert got["object"] == "chat.completion" and got["model"] == "tiny"
    (choice,) = got["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": want.text, "refusal": None, "tool_calls": None,
    }  # fmt: skip
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    usage, prompt, output = got["usage"], len(want.prompt_token_ids), len(want.token_ids)
    assert usage["prompt_tokens"] == prompt
    assert usage["completion_tokens"] == output
    assert usage["total_tokens"] == prompt + output
    details, told = usage["completion_tokens_details"], got["x_specrt"]
    assert details["accepted_prediction_tokens"] == told["accepted"]
    assert details["rejected_prediction_tokens"] == told["drafted"] - told["accepted"]
    assert told["rounds"] + told["accepted"] == output
    assert told["tau"] == pytest.approx(output / told["rounds"], abs=1e-4)


def test_a_stream_is_the_same_text(server: Running) -> None:
    whole = server.ok(CHAT, messages=QUESTION, temperature=0.7, seed=5, max_tokens=30)
    events = server.events(
        CHAT, messages=QUESTION, temperature=0.7, seed=5, max_tokens=30,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert events[-1] == "[DONE]"
    *chunks, last = events[:-1]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 30
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all("role" not in delta for delta in deltas[1:])
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["x_specrt"]["seed"] == whole["x_specrt"]["seed"] == 5


def test_what_is_left_open_is_sampled_and_can_be_repeated(server: Running) -> None:
    first = server.ok(CHAT, messages=QUESTION, max_tokens=20)
    seed = first["x_specrt"]["seed"]
    again = server.ok(CHAT, messages=QUESTION, max_completion_tokens=20, seed=seed)
    assert first["choices"] == again["choices"]
    want = own(server, max_new_tokens=20, temperature=1.0, seed=seed)
    assert first["choices"][0]["message"]["content"] == want.text


def test_each_choice_is_the_next_seed(server: Running) -> None:
    got = server.ok(CHAT, messages=QUESTION, n=3, seed=2**64 - 1, max_tokens=8)
    want = [own(server, max_new_tokens=8, temperature=1.0, seed=s) for s in (2**64 - 1, 0, 1)]
    assert [one["index"] for one in got["choices"]] == [0, 1, 2]
    assert [one["message"]["content"] for one in got["choices"]] == [one.text for one in want]
    assert got["usage"]["prompt_tokens"] == len(want[0].prompt_token_ids)
    assert got["usage"]["completion_tokens"] == 24
    texts = ["", "", ""]
    for event in server.events(CHAT, messages=QUESTION, n=3, seed=2**64 - 1, max_tokens=8)[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [one.text for one in want]


def test_a_stop_string_ends_it(server: Running) -> None:
    text = own(server, max_new_tokens=40).text
    stop = text[len(text) // 2 :][:4]
    want = own(server, max_new_tokens=40, stop=stop)
    options = {"messages": QUESTION, "temperature": 0, "max_tokens": 40, "stop": [stop]}
    got = server.ok(CHAT, **options)["choices"][0]
    assert got["message"]["content"] == want.text
    assert got["finish_reason"] == "stop" and got["stop_reason"] == stop
    *chunks, _ = server.events(CHAT, **options)
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == want.text


def test_speculation_is_the_requests_choice_and_the_text_is_not(server: Running) -> None:
    options = {"messages": QUESTION, "temperature": 0, "max_tokens": 30}
    free = server.ok(CHAT, **options)
    off = server.ok(CHAT, **options, speculative={"enabled": False})
    short = server.ok(CHAT, **options, speculative={"max_tokens": 2})
    assert free["choices"] == off["choices"] == short["choices"]
    assert off["x_specrt"]["drafted"] == 0 and off["x_specrt"]["rounds"] == 30
    assert free["x_specrt"]["accepted"] > 0 and short["x_specrt"]["accepted"] > 0


def test_logprobs_are_the_engines(server: Running) -> None:
    want = own(server, max_new_tokens=12, logprobs=True)
    options = {"messages": QUESTION, "temperature": 0, "max_tokens": 12, "logprobs": True}
    content = server.ok(CHAT, **options)["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in content] == want.logprobs
    assert "".join(one["token"] for one in content) == want.text
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == want.text
    streamed = []
    for event in server.events(CHAT, **options)[:-1]:
        given = event["choices"][0]["logprobs"]
        streamed += [] if given is None else given["content"]
    assert streamed == content


def test_parts_of_text_and_the_developers_role(server: Running) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 3 plus 4?"}]}]
    options = {"temperature": 0, "max_tokens": 4}
    assert (
        server.ok(CHAT, messages=parts, **options)["choices"]
        == server.ok(CHAT, messages=QUESTION, **options)["choices"]
    )


def test_rounds_and_their_trees(server: Running) -> None:
    events = server.events(
        CHAT, messages=QUESTION, temperature=0, max_tokens=20, x_specrt={"trees": True}
    )
    rounds = [event["x_specrt"] for event in events[1:-2]]
    text = "".join("".join(one["tokens"]) for one in rounds)
    assert text == own(server, max_new_tokens=20).text
    for one in rounds:
        assert 0 <= one["accepted"] <= len(one["tokens"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": QUESTION, "temperature": -1}, "temperature"),
        ({"messages": QUESTION, "temperature": "warm"}, "temperature"),
        ({"messages": QUESTION, "temperature": 1e-9}, "temperature"),
        ({"messages": QUESTION, "top_p": 0}, "top_p"),
        ({"messages": QUESTION, "n": 0}, "n"),
        ({"messages": QUESTION, "n": 65}, "n"),
        ({"messages": QUESTION, "max_tokens": 0}, "max_tokens"),
        ({"messages": QUESTION, "stop": [""]}, "stop"),
        ({"messages": QUESTION, "logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": QUESTION, "logit_bias": {"999999": 1}}, "logit_bias"),
        ({"messages": QUESTION, "seed": 2**64}, "seed"),
        ({"messages": QUESTION, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": QUESTION, "colour": "red"}, "colour"),
        ({"messages": QUESTION, "store": True}, "store"),
        ({"messages": QUESTION, "speculative": {"max_tokens": 64}}, "speculative.max_tokens"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": QUESTION, "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": QUESTION, "tool_choice": "required"}, "tools"),
        ({"messages": [{"role": "user", "content": "a " * 3000}]}, "messages"),
    ],
)
def test_what_is_wrong_is_named(server: Running, body: dict[str, Any], param: str) -> None:
    response = server.post(CHAT, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] is not None and error["param"].startswith(param), error
    assert error["message"].startswith(error["param"]), error


def test_another_model_is_not_found(server: Running) -> None:
    response = server.chat(model="huge")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
