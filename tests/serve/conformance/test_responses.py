"""``/v1/responses`` by the official client; skipped where a server has none."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

TEXT = "Tom has 3 apples and buys 4 more. How many apples has he?"

TOOL: Any = {
    "type": "function",
    "name": "add",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {name: {"type": "integer", "minimum": 0, "maximum": 9} for name in "ab"},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def responses(client: openai.OpenAI, model: str) -> openai.resources.Responses:
    try:
        client.responses.create(model=model, input=TEXT, max_output_tokens=16)
    except openai.NotFoundError:
        pytest.skip("no /v1/responses here")
    return client.responses


def test_an_answer(responses: openai.resources.Responses, model: str) -> None:
    answer = responses.create(model=model, input=TEXT, max_output_tokens=16, temperature=0)
    assert answer.object == "response" and answer.id
    assert answer.status in ("completed", "incomplete")
    assert answer.output_text
    assert answer.output[0].type == "message"
    assert answer.usage is not None and 0 < answer.usage.output_tokens <= 16
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_cut_by_the_limit(responses: openai.resources.Responses, model: str) -> None:
    answer = responses.create(model=model, input=TEXT, max_output_tokens=16, temperature=0)
    if answer.status == "incomplete":
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"


def test_messages_say_the_same(
    client: openai.OpenAI, responses: openai.resources.Responses, model: str
) -> None:
    answer = responses.create(
        model=model,
        input=[{"role": "user", "content": TEXT}],
        max_output_tokens=16,
        temperature=0,
    )
    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": TEXT}], max_tokens=16, temperature=0
    )
    assert answer.output_text == chat.choices[0].message.content


def test_a_stream(responses: openai.resources.Responses, model: str) -> None:
    whole = responses.create(model=model, input=TEXT, max_output_tokens=16, temperature=0)
    events = list(
        responses.create(model=model, input=TEXT, max_output_tokens=16, temperature=0, stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    told = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert told == whole.output_text
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))


def test_a_refused_one(responses: openai.resources.Responses, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        responses.create(model=model, input=TEXT, temperature=-1)


def ask_for_a_tool(
    responses: openai.resources.Responses, model: str, asked: Any = TEXT, **options: Any
) -> Any:
    """An answer, if the model's template knows of tools."""
    named: Any = {"type": "function", "name": "add"}
    try:
        return responses.create(
            model=model, input=asked, tools=[TOOL], tool_choice=named, max_output_tokens=120,
            temperature=0, **options,
        )  # fmt: skip
    except openai.BadRequestError as error:
        if "tool" not in str(error):
            raise
        pytest.skip(f"this model's template takes no tools: {error}")


def test_a_named_function_is_called(responses: openai.resources.Responses, model: str) -> None:
    answer = ask_for_a_tool(responses, model)
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "add" and call.id and call.call_id
    assert json.loads(call.arguments).keys() == {"a", "b"}
    assert answer.status == "completed" and answer.output_text == ""
    assert [tool.name for tool in answer.tools] == ["add"]


def test_a_streamed_call(responses: openai.resources.Responses, model: str) -> None:
    (whole,) = ask_for_a_tool(responses, model).output
    events = list(ask_for_a_tool(responses, model, stream=True))
    told = [event for event in events if hasattr(event, "output_index")]
    assert {event.output_index for event in told} == {0}
    kinds = list(dict.fromkeys(event.type for event in told))
    arguments = "response.function_call_arguments"
    assert kinds == [
        "response.output_item.added", f"{arguments}.delta", f"{arguments}.done",
        "response.output_item.done",
    ]  # fmt: skip
    begun, *deltas, done, ended = told
    assert begun.item.arguments == "" and begun.item.status == "in_progress"
    assert "".join(event.delta for event in deltas) == done.arguments == whole.arguments
    assert done.item_id == deltas[0].item_id == begun.item.id == ended.item.id
    assert ended.item.call_id == begun.item.call_id and ended.item.name == "add"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output == [ended.item]


def test_a_call_s_result_is_told(responses: openai.resources.Responses, model: str) -> None:
    (call,) = ask_for_a_tool(responses, model).output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    asked = [{"role": "user", "content": TEXT}, call, result]
    try:
        answer = responses.create(model=model, input=asked, max_output_tokens=16, temperature=0)
    except openai.BadRequestError as error:
        if "input" not in str(error):
            raise
        pytest.skip(f"this model's template takes no results of tools: {error}")
    assert answer.output_text


def test_a_function_that_is_none(responses: openai.resources.Responses, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        responses.create(
            model=model,
            input=TEXT,
            tools=[TOOL],
            tool_choice={"type": "function", "name": "subtract"},
        )
