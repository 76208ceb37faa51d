"""The lines of training files: chats, pairs of texts, problems, and tokens a target has written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specrt.json_lines import JsonItem

ASSISTANT = "assistant"

# ShareGPT's names for who speaks; OpenAI's stand for themselves.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "model": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "function": "function",
}
# GSM8K's annotations for a calculator, as in "48/2 = <<48/2=24>>24".
_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")
_FORMS = (
    '"conversations", "messages", "prompt" with "response" or "completion", '
    '"question" with "answer", or "prompt_ids" with "response_ids"'
)


@dataclass(frozen=True)
class Chat:
    """A conversation, to be told by a chat template."""

    messages: tuple[Mapping[str, str], ...]
    """With ``role`` and ``content``."""

    def without_opening(self) -> Chat:
        """Without the assistant's turns before anyone else's: templates refuse such."""
        turns = enumerate(self.messages)
        first = next((i for i, turn in turns if turn["role"] != ASSISTANT), len(self.messages))
        return Chat(self.messages[first:])

    def without_last_response(self) -> Chat:
        """Up to where the assistant is to speak next, or spoke last."""
        messages = self.messages
        while messages and messages[-1]["role"] == ASSISTANT:
            messages = messages[:-1]
        return Chat(messages)


@dataclass(frozen=True)
class Pair:
    """Plain text and what follows it."""

    prompt: str
    response: str | None


@dataclass(frozen=True)
class Problem:
    """A question and its answer: a chat where there is a template, else a plain pair."""

    question: str
    answer: str | None

    def as_chat(self) -> Chat:
        """As turns of a user and an assistant."""
        messages = [{"role": "user", "content": self.question}]
        if self.answer is not None:
            messages.append({"role": ASSISTANT, "content": self.answer})
        return Chat(tuple(messages))

    def as_pair(self) -> Pair:
        """As text."""
        answer = None if self.answer is None else f" {self.answer}"
        return Pair(f"Question: {self.question}\nAnswer:", answer)


@dataclass(frozen=True)
class Tokens:
    """A prompt and a response as the target itself had them."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


Record = Chat | Pair | Problem | Tokens


def parse_record(item: JsonItem) -> Record:
    """What one item says.

    Raises:
        ValueError: it is not JSON or has none of the known forms; names it.
    """
    where, data = item.where, item.value()
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(data).__name__}")
    if "prompt_ids" in data or "response_ids" in data:
        return Tokens(_ids(where, data, "prompt_ids"), _ids(where, data, "response_ids"))
    if "conversations" in data:
        return Chat(_messages(where, data, "conversations", "from", "value"))
    if "messages" in data:
        return Chat(_messages(where, data, "messages", "role", "content"))
    if "question" in data:
        answer = _optional_text(where, data, "answer")
        answer = None if answer is None else _CALCULATOR_NOTE.sub("", answer)
        return Problem(_text(where, data, "question"), answer)
    if "prompt" in data:
        key = "response" if "response" in data else "completion"
        return Pair(_text(where, data, "prompt"), _optional_text(where, data, key))
    keys = ", ".join(map(str, data)) or "no keys"
    raise ValueError(f"{where}: expected {_FORMS}; got {keys}")


# --- fields ---------------------------------------------------------------------------------------


def _text(where: str, data: Mapping[str, Any], key: str) -> str:
    value = data[key]
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{key}": expected text, got {type(value).__name__}')
    return value


def _optional_text(where: str, data: Mapping[str, Any], key: str) -> str | None:
    return None if data.get(key) is None else _text(where, data, key)


def _ids(where: str, data: Mapping[str, Any], key: str) -> tuple[int, ...]:
    ids = data.get(key)
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f'{where}: "{key}": expected a list of token ids')
    return tuple(ids)


def _messages(
    where: str, data: Mapping[str, Any], key: str, role_key: str, content_key: str
) -> tuple[Mapping[str, str], ...]:
    turns = data[key]
    if not isinstance(turns, list):
        raise ValueError(f'{where}: "{key}": expected a list, got {type(turns).__name__}')
    messages = []
    for number, turn in enumerate(turns, start=1):
        place = f'{where}: "{key}", turn {number}'
        if not isinstance(turn, dict) or not {role_key, content_key} <= turn.keys():
            raise ValueError(f'{place}: expected an object with "{role_key}" and "{content_key}"')
        role = turn[role_key]
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f'{place}: "{role_key}": expected user, assistant, ..., got {role!r}')
        messages.append({"role": _ROLES[role], "content": _content(place, turn[content_key])})
    return tuple(messages)


def _content(place: str, content: Any) -> str:
    """A turn's text, which OpenAI's form may give in parts."""
    parts: Sequence[Any] = (
        [content] if isinstance(content, str) else content if isinstance(content, list) else [None]
    )
    given = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(given):
        raise ValueError(f"{place}: expected text, got {json.dumps(content)[:60]}")
    return "".join(texts)
