"""``/v1/completions``, ``/v1/responses`` and the routes about tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest

from specrt import SamplingParams
from specrt.serve.chat import calls_in
from specrt.serve.response_fields import ResponseRequest
from specrt.serve.responses import ResponseMaker, ResponseWriter, as_chat
from tests.serve.support import QUESTION, Running, load_small, parsed, running

TEXTS = "/v1/completions"
ADD: dict[str, Any] = {
    "type": "function", "name": "add",
    "parameters": {
        "type": "object",
        "properties": {name: {"type": "integer", "minimum": 0, "maximum": 9} for name in "ab"},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}  # fmt: skip
PROMPT = "Question: What is 3 plus 4?\nAnswer:"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with load_small(max_batch=4) as engine, running(engine) as made:
        yield made


def test_forms_of_a_prompt(server: Running) -> None:
    ids = server.engine.encode(PROMPT)
    want = server.engine.generate(PROMPT, max_new_tokens=8)
    for prompt in (PROMPT, ids, [PROMPT], [ids]):
        got = server.ok(TEXTS, prompt=prompt, **GREEDY)
        (choice,) = got["choices"]
        assert choice == {
            "index": 0, "text": want.text, "logprobs": None,
            "finish_reason": "length", "stop_reason": None,
        }  # fmt: skip
        assert got["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("kind", ["APPLICATION/JSON; charset=utf-8", "application/x.y+json"])
def test_kinds_of_json(server: Running, kind: str) -> None:
    body = b'{"prompt": "Once", "max_tokens": 1}'
    response = server.client.post(TEXTS, content=body, headers={"Content-Type": kind})
    assert response.status_code == 200, response.text


def test_whole_numbers_may_be_written_as_floats(server: Running) -> None:
    floats = {
        "max_tokens": 6.0, "seed": 3.0, "n": 2.0, "top_k": 40.0, "logprobs": 0.0, "min_tokens": 1.0,
        "speculative": {"max_tokens": 3.0},
    }  # fmt: skip
    whole = {**{name: int(value) for name, value in floats.items() if name != "speculative"},
             "speculative": {"max_tokens": 3}}  # fmt: skip
    got, want = (server.ok(TEXTS, prompt=PROMPT, **one)["choices"] for one in (floats, whole))
    assert got == want
    answer = server.ok("/v1/responses", input="Once", max_output_tokens=2.0, n=1.0, temperature=1)
    assert answer["usage"]["output_tokens"] <= 2


def test_many_prompts_and_choices(server: Running) -> None:
    prompts = [PROMPT, "Once"]
    want = [
        server.engine.generate(prompt, max_new_tokens=6, temperature=1.0, seed=seed).text
        for prompt in prompts
        for seed in (3, 4)
    ]
    options = {"prompt": prompts, "n": 2, "seed": 3, "max_tokens": 6}
    got = server.ok(TEXTS, **options)
    assert [choice["text"] for choice in got["choices"]] == want
    texts = [""] * 4
    for event in server.events(TEXTS, **options)[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == want


def test_sixteen_tokens_where_nothing_is_said(server: Running) -> None:
    got = server.ok(TEXTS, prompt=PROMPT, ignore_eos=True)
    assert got["usage"]["completion_tokens"] == 16


def test_what_choices_find_of_their_own_prompt_is_not_cached(server: Running) -> None:
    got = server.ok(TEXTS, prompt="Once more. " * 40, n=3, cache_salt="fresh", **GREEDY)
    assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert got["x_specrt"]["cached_tokens"] > 0
    again = server.ok(TEXTS, prompt="Once more. " * 40, n=3, cache_salt="fresh", **GREEDY)
    size = again["usage"]["prompt_tokens"]
    assert 0 < again["usage"]["prompt_tokens_details"]["cached_tokens"] < size


def test_echo_and_no_token_at_all(server: Running) -> None:
    said = server.ok(TEXTS, prompt="Once", echo=True, **GREEDY)["choices"][0]["text"]
    assert said == "Once" + server.ok(TEXTS, prompt="Once", **GREEDY)["choices"][0]["text"]
    nothing = server.ok(TEXTS, prompt="Once", echo=True, max_tokens=0)
    assert nothing["choices"][0]["text"] == "Once"
    assert nothing["usage"]["completion_tokens"] == 0
    options = {"include_usage": True}
    *_, told, last = server.events(TEXTS, prompt="Once", max_tokens=0, stream_options=options)
    assert last == "[DONE]" and told["usage"]["completion_tokens"] == 0
    *chunks, last = server.events(TEXTS, prompt="Once", echo=True, **GREEDY)
    assert last == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == said


def test_logprobs_in_the_old_form(server: Running) -> None:
    want = server.engine.generate(PROMPT, max_new_tokens=8, logprobs=True)
    given = server.ok(TEXTS, prompt=PROMPT, logprobs=0, **GREEDY)["choices"][0]["logprobs"]
    assert given["token_logprobs"] == want.logprobs
    assert "".join(given["tokens"]) == want.text
    for token, start in zip(given["tokens"], given["text_offset"], strict=True):
        assert want.text[start:].startswith(token)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", "b" * 9000]}, "prompt[1]"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ],
)
def test_what_is_wrong_is_named(server: Running, body: dict[str, Any], param: str) -> None:
    response = server.post(TEXTS, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] is not None and error["param"].startswith(param), error
    assert error["message"].startswith(error["param"]), error


# --- /v1/responses --------------------------------------------------------------------------------


def test_a_response_is_the_chats_answer(server: Running) -> None:
    chat = server.ok("/v1/chat/completions", messages=QUESTION, **GREEDY)
    options = {"input": QUESTION[0]["content"], "temperature": 0, "max_output_tokens": 8}
    got = server.ok("/v1/responses", **options)
    assert got["status"] == "incomplete"
    assert got["incomplete_details"] == {"reason": "max_output_tokens"}
    ((part,),) = [message["content"] for message in got["output"]]
    assert part["text"] == chat["choices"][0]["message"]["content"]
    assert got["usage"]["output_tokens"] == 8
    with server.client.stream("POST", "/v1/responses", json={**options, "stream": True}) as answer:
        lines = "".join(answer.iter_text()).splitlines()
    assert lines[0] == "event: response.created" and "event: response.incomplete" in lines
    assert server.ok("/v1/responses", **{**options, "input": QUESTION})["output"] == [
        {**got["output"][0], "id": ANY}
    ]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": "a", "previous_response_id": "x"}, "previous_response_id"),
        ({"input": "a", "tools": [{}]}, "tools[0].type"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "a", "tools": [{**ADD, "name": "a b"}]}, "tools[0].name"),
        ({"input": "a", "tools": [ADD]}, "tools"),  # the template takes none
        ({"input": "a", "tools": [ADD], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        (
            {"input": "a", "tools": [ADD], "tool_choice": {"type": "function", "name": "x"}},
            "tool_choice",
        ),
        ({"input": "a", "tool_choice": "required"}, "tools"),
        ({"input": [{"type": "reasoning"}]}, "input[0]"),
        ({"input": [{"role": "king", "content": "a"}]}, "input[0].role"),
        (
            {"input": [{"type": "function_call", "name": "add", "arguments": "{}"}]},
            "input[0].call_id",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "image"}]}], "instructions": "b"},
            "input[0].content[0]",
        ),
        (
            {
                "input": [
                    {"type": "function_call_output", "call_id": "1", "output": [{"type": "image"}]}
                ]
            },
            "input[0].output[0]",
        ),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": "b " * 4000}, "input"),
        ({"input": [{"role": "user", "content": "b"}] * 4096}, "input"),
        ({"input": "a", "instructions": "b"}, "input"),
    ],
)
def test_what_a_response_cannot_be(server: Running, body: dict[str, Any], param: str) -> None:
    response = server.post("/v1/responses", **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


FORCED: dict[str, Any] = {
    "input": "What is 3 plus 4?", "temperature": 0, "max_output_tokens": 60,
    "tools": [ADD], "tool_choice": {"type": "function", "name": "add"},
}  # fmt: skip


def test_a_call_is_the_chats(server: Running) -> None:
    function = {name: value for name, value in ADD.items() if name != "type"}
    chat = server.ok(
        "/v1/chat/completions",
        messages=QUESTION,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "add"}},
        temperature=0,
        max_tokens=60,
    )
    (want,) = chat["choices"][0]["message"]["tool_calls"]
    got = server.ok("/v1/responses", **FORCED)
    (call,) = got["output"]
    assert call == {
        "type": "function_call", "id": ANY, "call_id": ANY, "status": "completed",
        **want["function"],
    }  # fmt: skip
    assert call["id"] != call["call_id"] and got["status"] == "completed"
    assert got["tool_choice"] == {"type": "function", "name": "add"}
    assert got["tools"][0].items() >= ADD.items() and got["parallel_tool_calls"]


CALL = '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>'


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "num_calls"),
    [
        ("Seven.", "Seven.", 0),
        (" Let me. \n" + CALL, "Let me.", 1),
        ("\n\n" + CALL + CALL, None, 2),
        ("", "", 0),
        (" ", " ", 0),
        ("<tool_call>{", "<tool_call>{", 0),
    ],
)
def test_streams_tell_texts_from_calls(
    server: Running, text: str, said: str | None, num_calls: int, size: int
) -> None:
    body = ResponseRequest.model_validate({"input": "a", "tools": [ADD]})
    result = server.engine.generate("Once", max_new_tokens=1)
    result = replace(result, text=text, finish_reason="stop")
    stream = SimpleNamespace(params=[[SamplingParams()]], prompt_ids=[[1]])
    answering: Any = SimpleNamespace(
        request=SimpleNamespace(scope={}), stream=stream, in_order=lambda: [result]
    )
    chat = as_chat(body)
    maker = ResponseMaker(server.service, body, chat, answering)
    writer = ResponseWriter(maker)
    data = writer.opening()
    for start in range(0, len(text), size):
        piece: Any = SimpleNamespace(text=text[start : start + size])
        data += writer.chunk(piece)
    events = parsed((data + writer.closing()).decode())
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    output = events[-1]["response"]["output"]
    ended = [one for one in events if one["type"] == "response.output_item.done"]
    assert [one["item"] for one in ended] == output
    assert [one["output_index"] for one in ended] == list(range(len(output)))
    told = "".join(one["delta"] for one in events if one["type"].endswith("output_text.delta"))
    whole = maker.items(result, *calls_in(chat, text))
    kinds = [item.type for item in whole]
    assert [item["type"] for item in output] == kinds
    assert kinds == ["message"] * (said is not None) + ["function_call"] * num_calls
    if said is not None:
        assert output[0]["content"][0]["text"] == told
        assert told.strip() == said.strip() and whole[0].content[0].text == said


def test_arguments_that_are_no_json_stay_text(server: Running) -> None:
    call = {"type": "function_call", "call_id": "1", "name": "add"}
    for arguments in ("oops", "[" * 20_000):
        items = [{"role": "user", "content": "a"}, {**call, "arguments": arguments}]
        server.ok("/v1/responses", input=items, max_output_tokens=1)


def test_what_is_made_of_calls_and_their_results() -> None:
    called = {"type": "function_call", "id": "fc_1", "status": "completed", "name": "add"}
    items = [
        {"role": "user", "content": "What is 3 plus 4?"},
        {"type": "message", "role": "assistant", "content": "Let me see."},
        {**called, "call_id": "1", "arguments": '{"a": 3}'},
        {**called, "call_id": "2", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "7"},
        {**called, "call_id": "3", "arguments": "{}"},
    ]
    body = ResponseRequest.model_validate({"input": items})
    calls = [
        {"id": one, "type": "function", "function": {"name": "add", "arguments": arguments}}
        for one, arguments in (("1", '{"a": 3}'), ("2", "{}"), ("3", "{}"))
    ]
    assert [turn.model_dump(exclude_unset=True) for turn in as_chat(body).messages] == [
        {"role": "user", "content": "What is 3 plus 4?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls[:2]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
        {"role": "assistant", "content": None, "tool_calls": calls[2:]},
    ]


# --- tokens, and the server itself ----------------------------------------------------------------


def test_tokens_there_and_back(server: Running) -> None:
    got = server.ok("/tokenize", prompt=PROMPT, return_token_strs=True)
    assert got["tokens"] == server.engine.encode(PROMPT)
    assert got["count"] == len(got["tokens"])
    assert "".join(got["token_strs"]).endswith(PROMPT)
    assert server.ok("/detokenize", tokens=got["tokens"])["prompt"] == PROMPT
    chat = server.ok("/tokenize", messages=QUESTION)
    assert chat["tokens"] == server.engine.encode(QUESTION)
    for body in ({}, {"prompt": "a", "messages": QUESTION}):
        assert server.post("/tokenize", **body).status_code == 400
    assert server.post("/detokenize", tokens=[10**9]).status_code == 400


def test_what_the_server_says_of_itself(server: Running) -> None:
    client = server.client
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["object"] == "model"
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/huge").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    assert "version" in client.get("/version").json()
    assert client.get("/docs").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)]
)
def test_every_error_has_the_form(server: Running, method: str, path: str, status: int) -> None:
    response = server.client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_half_a_character_is_refused(server: Running) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.client.post(TEXTS, content=b'{"prompt": "\\ud800"}', headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt":' * 5000, b"null"])
def test_bodies_that_are_no_object(server: Running, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.client.post(TEXTS, content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_openapi_names_every_route_and_its_errors(server: Running) -> None:
    schema = server.client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/health"} <= set(
        schema["paths"]
    )
    for path in schema["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            assert "400" in operation["responses"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
