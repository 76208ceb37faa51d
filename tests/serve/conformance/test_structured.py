"""Answers of a given form, and tools."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel, ConfigDict

ASKED: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples has he?"}
]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "fruit": {"enum": ["apple", "pear"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "is_ripe": {"type": "boolean"},
    },
    "required": ["fruit", "count", "is_ripe"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "fruit", "schema": SCHEMA, "strict": True},
}
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 999},
                "b": {"type": "integer", "minimum": 0, "maximum": 999},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


class Fruit(BaseModel):
    """What the schema describes."""

    model_config = ConfigDict(extra="forbid")
    fruit: str
    count: int
    is_ripe: bool


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_schema_is_kept_to(client: openai.OpenAI, model: str, seed: int) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=ASKED,
        max_tokens=80,
        temperature=1.0,
        seed=seed,
        response_format=FORMAT,
    )
    assert answer.choices[0].finish_reason == "stop"
    fruit = Fruit.model_validate_json(answer.choices[0].message.content or "")
    assert fruit.fruit in ("apple", "pear") and 0 <= fruit.count <= 99


def test_a_stream_of_a_schema(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {
        "max_tokens": 80, "temperature": 1.0, "seed": 1, "response_format": FORMAT
    }  # fmt: skip
    whole = client.chat.completions.create(model=model, messages=ASKED, **options)
    chunks = client.chat.completions.create(model=model, messages=ASKED, stream=True, **options)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content


def test_the_parse_helper(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=ASKED, max_tokens=200, temperature=0, response_format=Small
    )
    assert isinstance(answer.choices[0].message.parsed, Small)


class Small(BaseModel):
    """Short to say, whatever the model."""

    model_config = ConfigDict(extra="forbid")
    is_true: bool


def test_any_object(client: openai.OpenAI, model: str) -> None:
    """Cut by the limit or not, it begins as an object."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Answer in JSON: what is 2 + 2?"}],
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_object"},
    )
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_text_is_the_default(client: openai.OpenAI, model: str) -> None:
    texts = [
        client.chat.completions.create(
            model=model, messages=ASKED, max_tokens=8, temperature=0, **options
        )
        .choices[0]
        .message.content
        for options in ({}, {"response_format": {"type": "text"}})  # type: ignore[arg-type]
    ]
    assert texts[0] == texts[1]


def test_no_schema(client: openai.OpenAI, model: str) -> None:
    bad: Any = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "stone"}}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=ASKED, response_format=bad)


def ask_for_a_tool(client: openai.OpenAI, model: str, **options: Any) -> Any:
    """An answer, if the model's template knows of tools."""
    try:
        return client.chat.completions.create(
            model=model,
            messages=ASKED,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "add"}},
            max_tokens=120,
            temperature=0,
            **options,
        )
    except openai.BadRequestError as error:
        if "tool" not in str(error):
            raise
        pytest.skip(f"this model's template takes no tools: {error}")


def test_a_named_tool_is_called(client: openai.OpenAI, model: str) -> None:
    (choice,) = ask_for_a_tool(client, model).choices
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id and call.function.name == "add"
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"a", "b"}
    assert choice.finish_reason in ("tool_calls", "stop")


def test_a_streamed_tool_call(client: openai.OpenAI, model: str) -> None:
    whole = ask_for_a_tool(client, model).choices[0].message.tool_calls[0].function
    name, arguments = "", ""
    for chunk in ask_for_a_tool(client, model, stream=True):
        for call in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
            assert call.index == 0
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, arguments) == (whole.name, whole.arguments)


def test_a_tool_that_is_none(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=model,
            messages=ASKED,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "subtract"}},
        )


@pytest.mark.extension
@pytest.mark.parametrize(
    ("form", "texts"),
    [({"choice": ["yes", "no"]}, {"yes", "no"}), ({"regex": "[ab]"}, {"a", "b"})],
)
def test_choices_and_expressions(
    client: openai.OpenAI, model: str, form: dict[str, Any], texts: set[str]
) -> None:
    answer = client.completions.create(
        model=model,
        prompt="Question: Is it?\nAnswer:",
        max_tokens=16,
        temperature=1.0,
        seed=1,
        extra_body={"structured_outputs": form},
    )
    assert answer.choices[0].text in texts


@pytest.mark.extension
def test_speculation_keeps_the_form(client: openai.OpenAI, model: str) -> None:
    """The text of a schema is the same with and without drafts."""
    texts = {
        client.chat.completions.create(
            model=model,
            messages=ASKED,
            max_tokens=80,
            temperature=1.0,
            seed=9,
            response_format=FORMAT,
            extra_body={"speculative": speculative},
        )
        .choices[0]
        .message.content
        for speculative in ({"enabled": False}, {"enabled": True}, {"max_tokens": 2})
    }
    assert len(texts) == 1
