"""Calls of tools in a model's text, and texts that are none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from specrt.serve.tools import CallReader, Function, NamedTool, Tool, forced_form

CALL = '{"name": "add", "arguments": {"a": 1}}'
NAMES = ("add", "ask")


def read(text: str, size: int, *, is_forced: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """What is shown of a text that comes in pieces, and its calls."""
    reader = CallReader(NAMES, is_forced=is_forced)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    shown = "".join(map(reader.feed, pieces))
    rest, calls = reader.end()
    assert len({call.id for call in calls}) == len(calls)
    return shown + rest, [(call.function.name, call.function.arguments) for call in calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("Seven.", "Seven.", []),
        ("a < b <tool", "a < b <tool", []),
        (f"<tool_call>\n{CALL}\n</tool_call>", "", [("add", '{"a": 1}')]),
        (f"Let me. <tool_call>{CALL}</tool_call>", "Let me. ", [("add", '{"a": 1}')]),
        (f"<tool_call>{CALL}", "", [("add", '{"a": 1}')]),
        (
            f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name": "ask"}}</tool_call>',
            "",
            [("add", '{"a": 1}'), ("ask", "{}")],
        ),
        ("<tool_call>{oops</tool_call>", "<tool_call>{oops</tool_call>", []),
        ("<tool_call></tool_call> a ", "<tool_call></tool_call> a ", []),
        ('{"name": "add", "parameters": {"a": 2}}', "", [("add", '{"a": 2}')]),
        (f"{CALL}; {CALL}", "", [("add", '{"a": 1}')] * 2),
        (f"[{CALL}]", "", [("add", '{"a": 1}')]),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ('{"sum": 3}', '{"sum": 3}', []),
        ("[1, 2]", "[1, 2]", []),
        ("", "", []),
    ],
)
def test_calls_and_text(text: str, shown: str, calls: list[tuple[str, str]], size: int) -> None:
    assert read(text, size) == (shown, calls)


def test_text_is_shown_as_it_comes() -> None:
    reader = CallReader(NAMES)
    assert reader.feed("Two and two ") == "Two and two "
    assert reader.feed("<") == "" and reader.feed("b") == "<b"


def tool(name: str) -> Tool:
    return Tool(type="function", function=Function(name=name, parameters={"type": "object"}))


def test_a_forced_call_has_the_form_of_its_tool() -> None:
    tools = [tool("add"), tool("ask")]
    every = json.loads(forced_form(tools, "required").source)
    assert [one["properties"]["name"]["const"] for one in every["anyOf"]] == ["add", "ask"]
    named = NamedTool.model_validate({"type": "function", "function": {"name": "ask"}})
    one = json.loads(forced_form(tools, named).source)
    assert one["properties"]["name"] == {"const": "ask"}
    with pytest.raises(ValueError, match="tool_choice: expected the name of one of the tools"):
        forced_form(tools[:1], named)
    assert read(CALL, 5, is_forced=True) == ("", [("add", '{"a": 1}')])


def test_pointers_of_a_tool_s_schema_still_find_what_they_name() -> None:
    parameters = {
        "type": "object",
        "properties": {
            "a": {"$ref": "#/$defs/A"},
            "again": {"type": "array", "items": {"$ref": "#"}},
            "sample": {"const": {"$ref": "#/$defs/A"}},
            "default": {"$ref": "#/$defs/A"},
            "anchored": {"$ref": "#a"},
            "named": {"$id": "http://a", "$ref": "#/$defs/A", "$defs": {"A": {"type": "null"}}},
        },
        "$defs": {"A": {"type": "integer", "$anchor": "a"}},
    }
    tools = [Tool(type="function", function=Function(name=n, parameters=parameters)) for n in "xy"]
    for form, place in (
        (forced_form(tools, "required"), 1),
        (forced_form(tools[:1], "required"), 0),
    ):
        schema = json.loads(form.source)
        call = schema["anyOf"][place] if "anyOf" in schema else schema
        moved = call["properties"]["arguments"]["properties"]
        for name in ("a", "default"):
            assert _at(schema, moved[name]["$ref"])["type"] == "integer"
        for name in ("anchored", "named"):
            assert moved[name] == parameters["properties"][name]
        assert _at(schema, moved["again"]["items"]["$ref"])["properties"] == moved
        assert moved["sample"] == {"const": {"$ref": "#/$defs/A"}}


def _at(schema: dict[str, Any], pointer: str) -> Any:
    found: Any = schema
    for part in pointer.removeprefix("#/").split("/"):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found
