"""Tools: what a request offers, and calls of them in a model's text."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from specrt.sampling import StructuredOutput
from specrt.serve.fields import JsonObject, Strict

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_SAMPLES = ("const", "enum", "default", "examples")
"""Keys of a schema whose values are none."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""Keys of a schema whose values are schemas by names, which are no keys of one."""


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; functions are all there are."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """A function by its name."""

    name: str


class NamedTool(Strict):
    """The tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


class FunctionCall(BaseModel):
    """A call, its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call with an id, by which its result is told."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


def forced_form(tools: Sequence[Tool], choice: str | NamedTool) -> StructuredOutput:
    """The form of text that calls one of the tools, or the named one.

    Raises:
        ValueError: no tool has that name.
    """
    wanted = [
        tool.function
        for tool in tools
        if isinstance(choice, str) or tool.function.name == choice.function.name
    ]
    if not wanted:
        raise ValueError("tool_choice: expected the name of one of the tools, got another")
    base = "#" if len(wanted) == 1 else "#/anyOf/{}"
    try:
        calls = [_form_of(one, base.format(place)) for place, one in enumerate(wanted)]
    except RecursionError:
        raise ValueError("tools: expected parameters of fewer levels") from None
    return StructuredOutput(json_schema=calls[0] if len(calls) == 1 else {"anyOf": calls})


def _form_of(function: Function, place: str) -> dict[str, Any]:
    parameters = function.parameters or {"type": "object"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": _moved(parameters, f"{place}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(part: Any, root: str) -> Any:
    """A schema that lies at ``root`` of another: its pointers (``$ref``) begin there, but for those
    within one that has a name of its own (``$id``)."""
    if isinstance(part, list):
        return [_moved(one, root) for one in part]
    if not isinstance(part, dict) or isinstance(part.get("$id"), str):
        return part
    return {key: _moved_value(key, value, root) for key, value in part.items()}


def _moved_value(key: str, value: Any, root: str) -> Any:
    if key in _SAMPLES:
        return value
    if key in _NAMED and isinstance(value, dict):
        return {name: _moved(one, root) for name, one in value.items()}
    is_pointer = isinstance(value, str) and (value == "#" or value.startswith("#/"))
    if key == "$ref" and is_pointer:
        return root + value[1:]
    return _moved(value, root)


class CallReader:
    """Tells a model's text from its calls, as it comes.

    Calls are JSON with ``name`` and ``arguments`` in ``<tool_call>`` tags (Hermes, Qwen), or the
    whole text is such JSON (Llama 3, whose word for arguments is ``parameters``; several of them
    with semicolons between). What looks like a call and is none stays text.

    Args:
        names: of the functions that there are.
        is_forced: whether the text is nothing but calls.
    """

    def __init__(self, names: Sequence[str], *, is_forced: bool = False) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._is_first = True
        self._keeps_all = is_forced
        self.has_shown = False

    def feed(self, text: str) -> str:
        """Add text; what of it is none of a call."""
        self._held += text
        if self._is_first and (head := self._held.lstrip()):
            self._keeps_all |= head[0] in "{["
            self._is_first = False
        if self._keeps_all or self._is_first:
            return ""
        place = self._held.find(_OPEN)
        if place < 0:
            place = len(self._held) - _num_begun(self._held)
        shown, self._held = self._held[:place], self._held[place:]
        self._keeps_all = self._held.startswith(_OPEN)
        self.has_shown |= bool(shown.strip())
        return shown

    def end(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls."""
        held, self._held = self._held, ""
        if held.lstrip().startswith(_OPEN):
            rest, calls = _tagged(held, self._names)
            return (rest, calls) if calls else (held, [])
        found = _bare(held, self._names)
        return (held, []) if found is None else ("", found)


def _num_begun(text: str) -> int:
    """Letters at a text's end with which a tag may begin."""
    sizes = range(min(len(_OPEN) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(_OPEN[:size])), 0)


def _tagged(text: str, names: frozenset[str]) -> tuple[str, list[ToolCall]]:
    rest, calls = [], []
    for piece in text.split(_OPEN):
        inside, _, behind = piece.partition(_CLOSE)
        found = _call(_parsed(inside), names) if inside.strip() else None
        if found is not None:
            calls.append(found)
            rest.append(behind)
        elif inside.strip():
            rest.append(_OPEN + piece)
        else:
            rest.append(behind)
    return "".join(rest).strip(), calls


def _bare(text: str, names: frozenset[str]) -> list[ToolCall] | None:
    """The calls that a whole text is; None: it is something else."""
    whole = _parsed(text)
    items: list[Any] = whole if isinstance(whole, list) else [whole]
    if whole is None:
        items = [_parsed(piece) for piece in text.split(";")]
    calls = [_call(item, names) for item in items]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(item: Any, names: frozenset[str]) -> ToolCall | None:
    if not isinstance(item, Mapping) or item.get("name") not in names:
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    call = FunctionCall(name=item["name"], arguments=arguments)
    return ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", function=call)
