"""Turns of conversations, in ShareGPT's words, OpenAI's, or a mixture of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specrt.models.chat import check_characters

ASSISTANT, USER, SYSTEM, TOOL, DEVELOPER = "assistant", "user", "system", "tool", "developer"

# What files call who speaks, in lower case.
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "ai", "bot", "model", "bing", "bard"), ASSISTANT
    ),
    **dict.fromkeys(("function_call", "tool_call"), ASSISTANT),  # ShareGPT's: a call as text
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), TOOL),
    "system": SYSTEM,
    "developer": DEVELOPER,
}
_CALLS = "tool_calls"
# What else of a message chat templates read.
_READ = ("name", "tool_call_id", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Turn:
    """What one of a conversation's speakers says."""

    message: Mapping[str, Any]
    """As chat templates take it: ``role``, ``content``, and what there is of tool calls."""
    is_counted: bool = False
    """Whether a loss counts it: the assistant's, unless the file or its form says otherwise."""

    @classmethod
    def of(cls, role: str, content: str) -> Turn:
        """Plain text."""
        return cls({"role": role, "content": content}, role == ASSISTANT)

    @property
    def role(self) -> str:
        """Who speaks: user, assistant, system, developer or tool."""
        return str(self.message["role"])

    def uncounted(self) -> Turn:
        """The same, passed over by the loss."""
        return replace(self, is_counted=False)

    def fitted(self, template: str) -> Turn:
        """As a chat template can tell it, by the words that stand in the template.

        A developer's turn is the system's where the template does not name developers. Where it
        does not tell tool calls, a turn that makes some is not counted: its text would be another
        than the assistant's.
        """
        is_named = any(f"{quote}{DEVELOPER}{quote}" in template for quote in "'\"")
        if self.role == DEVELOPER and not is_named:
            return replace(self, message={**self.message, "role": SYSTEM})
        if _CALLS in self.message and _CALLS not in template:
            return self.uncounted()
        return self


def parse_turns(where: str, turns: Any) -> tuple[Turn, ...]:
    """The turns of a list of objects with ``role`` and ``content``, or ``from`` and ``value``.

    Args:
        where: what errors call the list.
        turns: the list, as JSON gives it.

    Raises:
        ValueError: it is no such list; names the turn and the key.
    """
    if not isinstance(turns, list):
        raise ValueError(f"{where}: expected a list, got {type(turns).__name__}")
    return tuple(_turn(f"{where}, turn {number}", turn) for number, turn in enumerate(turns, 1))


def checked_text(where: str, value: Any) -> str:
    """A text that can be encoded.

    Raises:
        ValueError: it is no text, or has half of a surrogate pair; names ``where``.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text, got {type(value).__name__}")
    return check_characters(where, value)


def _turn(place: str, turn: Any) -> Turn:
    role_key = _key(turn, "role", "from")
    content_key = _key(turn, "content", "value")
    calls = _calls(place, turn) if isinstance(turn, dict) else []
    if role_key is None or (content_key is None and not calls):
        raise ValueError(
            f'{place}: expected an object with "role" and "content", or "from" and "value"'
        )
    given = turn[role_key]
    role = _ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise ValueError(f'{place}: "{role_key}": expected user, assistant, ..., got {given!r}')
    content = turn.get(content_key)
    text = "" if content is None and calls else _content(place, content)
    message: dict[str, Any] = {"role": role, "content": text}
    if calls:
        message[_CALLS] = calls
    message |= {key: turn[key] for key in _READ if isinstance(turn.get(key), str)}
    return Turn(message, role == ASSISTANT and turn.get("weight") != 0)


def _key(turn: Any, *names: str) -> str | None:
    return next((name for name in names if isinstance(turn, dict) and name in turn), None)


def _content(place: str, content: Any) -> str:
    """A turn's text, which OpenAI's form may give in parts."""
    if isinstance(content, str):
        return checked_text(place, content)
    parts: Sequence[Any] = content if isinstance(content, list) else [None]
    given = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = [checked_text(place, text) for text in given if isinstance(text, str)]
    if len(texts) < len(given):
        raise ValueError(f"{place}: expected text, got {json.dumps(content)[:60]}")
    return "".join(texts)


def _calls(place: str, turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A turn's calls of tools, their arguments as objects, which is what templates expect."""
    calls = turn.get(_CALLS) or []
    if not calls and turn.get("function_call"):  # OpenAI's before there were several
        calls = [{"type": "function", "function": turn["function_call"]}]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f'{place}: "{_CALLS}": expected a list of objects')
    return [
        {**call, "function": _function(call["function"])} if "function" in call else call
        for call in calls
    ]


def _function(function: Any) -> Any:
    """With arguments parsed that are JSON in a text."""
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return function
    try:
        parsed = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return function
    return {**function, "arguments": parsed} if isinstance(parsed, dict) else function
