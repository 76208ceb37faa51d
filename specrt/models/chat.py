"""Chat messages as chat templates take them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# OpenAI's names of parts that are text.
_TEXT_PARTS = ("text", "input_text", "output_text")
_PROBE = "specrt-probe"
# A list of parts that a template did not look into, as Python or JSON writes it.
_UNREAD_PART = re.compile(rf"""['"]text['"]: ?['"]{_PROBE}""")


def template_messages(
    messages: Sequence[Mapping[str, Any]],
    render: Callable[[list[dict[str, Any]]], str],
    *,
    knows_tool_calls: bool,
) -> list[dict[str, Any]]:
    """Messages whose content the template can take.

    Content in parts (OpenAI's form) is joined, unless the template goes through parts itself. An
    assistant's null content beside its ``tool_calls`` is left out, as ``transformers`` does, or
    templates would write "None"; where the template does not know of tool calls it is empty text.

    Args:
        messages: with ``role`` and ``content``, text or parts of text.
        render: a template's text of such messages; raises ValueError if it refuses them.
        knows_tool_calls: whether the template does.

    Raises:
        ValueError: there are none, or one is not well-formed; names it by its index.
    """
    if not messages:
        raise ValueError("prompt: expected at least one message, got none")
    checked = [_checked(f"messages[{i}]", message) for i, message in enumerate(messages)]
    has_parts = any(isinstance(message.get("content"), list) for message in checked)
    takes_parts = has_parts and _takes_parts(render)
    for message in checked:
        content = message.get("content")
        if isinstance(content, list) and not takes_parts:
            message["content"] = "".join(part["text"] for part in content)
        elif content is None and not knows_tool_calls:
            message["content"] = ""
    return checked


def check_characters(name: str, text: str) -> str:
    """A text, if it can be encoded.

    Raises:
        ValueError: it has half of a surrogate pair (JSON cut within ``\\ud83d\\ude00``), which is
            no character; names its position.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(
            f"{name}: expected characters, got half of one, {half}, at position {error.start}"
        ) from None
    return text


def _takes_parts(render: Callable[[list[dict[str, Any]]], str]) -> bool:
    probe = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
    try:
        text = render(probe)
    except ValueError:
        return False
    return _PROBE in text and not _UNREAD_PART.search(text)


def _checked(name: str, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"prompt: {name}: expected a mapping, got {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        got = repr(message["role"]) if "role" in message else f"keys {', '.join(map(str, message))}"
        raise ValueError(f'prompt: {name}: expected a "role" of text, got {got}')
    checked = {**message, "content": _content(name, message)}
    return {key: value for key, value in checked.items() if value is not None}


def _content(name: str, message: Mapping[str, Any]) -> str | list[dict[str, Any]] | None:
    content = message.get("content")
    if isinstance(content, str):
        return check_characters(f"prompt: {name}", content)
    if content is None and message.get("tool_calls"):
        return None
    if isinstance(content, list | tuple):
        return [_text_part(f"{name}: content[{i}]", part) for i, part in enumerate(content)]
    got = type(content).__name__ if "content" in message else "none"
    raise ValueError(f'prompt: {name}: expected "content" of text or parts of text, got {got}')


def _text_part(name: str, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if isinstance(part, Mapping):
        kind = part.get("type", "text")
        if kind not in _TEXT_PARTS:
            raise ValueError(f"prompt: {name}: expected text, got a part of type {kind!r}")
        if isinstance(part.get("text"), str):
            text = check_characters(f"prompt: {name}", part["text"])
            return {**part, "type": "text", "text": text}
    raise ValueError(f'prompt: {name}: expected a part with "text", got {type(part).__name__}')
