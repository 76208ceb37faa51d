"""The lines of training files: chats, pairs of texts, problems, and tokens a target has written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from specrt.json_lines import JsonItem
from specrt.models.tokenizer import Tokenizer
from specrt.train.data.turns import ASSISTANT, SYSTEM, USER, Turn, checked_text, parse_turns

# GSM8K's annotations for a calculator, as in "48/2 = <<48/2=24>>24".
_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")
_CHATS = ("conversations", "messages")
_ANSWERS = ("response", "completion", "chosen")
_FORMS = (
    '"conversations", "messages", "prompt" with "response", "completion" or "chosen", "question" '
    'with "answer", "instruction" with "output", "turns", or "prompt_ids" with "response_ids"'
)
_MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class Chat:
    """A conversation, to be told by a chat template."""

    turns: tuple[Turn, ...]

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        """As the template takes them."""
        return [turn.message for turn in self.turns]

    def fitted(self, template: str) -> Chat:
        """As a template can tell it, without the assistant's turns before anyone else's."""
        turns = enumerate(self.turns)
        first = next((i for i, turn in turns if turn.role != ASSISTANT), len(self.turns))
        return Chat(tuple(turn.fitted(template) for turn in self.turns[first:]))

    def without_last_response(self) -> Chat:
        """Up to where the assistant is to speak next, or spoke last."""
        turns = self.turns
        while turns and turns[-1].role == ASSISTANT:
            turns = turns[:-1]
        return Chat(turns)


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
        turns = [Turn.of(USER, self.question)]
        if self.answer is not None:
            turns.append(Turn.of(ASSISTANT, self.answer))
        return Chat(tuple(turns))

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
        ValueError: it is not JSON or has none of the known forms; names it and the key.
    """
    where, data = item.where, item.value()
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(data).__name__}")
    if "prompt_ids" in data or "response_ids" in data:
        return Tokens(_ids(where, data, "prompt_ids"), _ids(where, data, "response_ids"))
    for key in _CHATS:
        if key in data:
            return _with_system(where, data, _turns(where, data, key))
    if "instruction" in data:
        return _with_system(where, data, _instruction(where, data))
    if "question" in data:
        answer = _optional_text(where, data, "answer")
        answer = None if answer is None else _CALCULATOR_NOTE.sub("", answer)
        return Problem(_text(where, data, "question"), answer)
    if "prompt" in data:
        return _prompted(where, data)
    if "chosen" in data:
        return Chat(_turns(where, data, "chosen"))
    if "turns" in data:
        return Problem(_first_question(where, data["turns"]), None)
    keys = ", ".join(map(str, data)) or "no keys"
    raise ValueError(f"{where}: expected {_FORMS}; got {keys}")


def fitted(record: Record, tokenizer: Tokenizer) -> Chat | Pair | Tokens:
    """A record in the form that a tokenizer takes: problems are chats where it has a template."""
    template = tokenizer.inner.chat_template
    if isinstance(record, Problem):
        record = record.as_pair() if template is None else record.as_chat()
    return record.fitted(str(template)) if isinstance(record, Chat) else record


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Have what a template or a tokenizer raises over a line name that line.

    Templates are programs that come with a checkpoint and may raise anything.

    Raises:
        ValueError: in the place of every exception but those of the machine.
    """
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        said = str(error).removeprefix("prompt: ") or type(error).__name__
        raise ValueError(f"{where}: {said}") from error


# --- forms ----------------------------------------------------------------------------------------


def _prompted(where: str, data: Mapping[str, Any]) -> Pair | Chat:
    """A prompt and its answer: texts without a template, or lists of turns.

    Of a chat only the answer counts. One that does not begin with the assistant holds the prompt
    too, as in sets of preferences, and counts like any conversation.
    """
    key = next((key for key in _ANSWERS if key in data), _ANSWERS[0])
    prompt, answer = data["prompt"], data.get(key)
    if not isinstance(prompt, list) and not isinstance(answer, list):
        return Pair(_text(where, data, "prompt"), _optional_text(where, data, key))
    asked = _turns(where, data, "prompt", USER)
    said = () if answer is None else _turns(where, data, key, ASSISTANT)
    if said and said[0].role != ASSISTANT:
        return Chat(said)
    return Chat((*(turn.uncounted() for turn in asked), *said))


def _instruction(where: str, data: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Alpaca's form: an instruction, what it is about, and the output; turns before them."""
    turns = []
    history = data.get("history") or []
    for pair in history if isinstance(history, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f'{where}: "history": expected a list of pairs of texts')
        asked, said = (checked_text(f'{where}: "history"', text) for text in pair)
        turns += [Turn.of(USER, asked), Turn.of(ASSISTANT, said)]
    texts = [_text(where, data, "instruction"), _optional_text(where, data, "input")]
    turns.append(Turn.of(USER, "\n".join(text for text in texts if text)))
    output = _optional_text(where, data, "output")
    return (*turns, *([] if output is None else [Turn.of(ASSISTANT, output)]))


def _with_system(where: str, data: Mapping[str, Any], turns: tuple[Turn, ...]) -> Chat:
    """The turns behind the text of a key "system", if there is one."""
    system = _optional_text(where, data, "system")
    return Chat((Turn.of(SYSTEM, system), *turns) if system else turns)


def _first_question(where: str, turns: Any) -> str:
    """MT-Bench's form, of which later questions are about an answer that is still to come."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f'{where}: "turns": expected a list of texts')
    return checked_text(f'{where}: "turns"', turns[0])


# --- fields ---------------------------------------------------------------------------------------


def _text(where: str, data: Mapping[str, Any], key: str) -> str:
    return checked_text(f'{where}: "{key}"', data[key])


def _optional_text(where: str, data: Mapping[str, Any], key: str) -> str | None:
    return None if data.get(key) is None else _text(where, data, key)


def _turns(
    where: str, data: Mapping[str, Any], key: str, speaker: str | None = None
) -> tuple[Turn, ...]:
    """A list of turns; a plain text is one of the ``speaker``, if one is given."""
    value = data[key]
    if speaker is not None and isinstance(value, str):
        return (Turn.of(speaker, _text(where, data, key)),)
    return parse_turns(f'{where}: "{key}"', value)


def _ids(where: str, data: Mapping[str, Any], key: str) -> tuple[int, ...]:
    ids = data.get(key)
    if not isinstance(ids, list) or not all(
        type(token) is int and 0 <= token <= _MAX_ID for token in ids
    ):
        raise ValueError(f'{where}: "{key}": expected a list of token ids')
    return tuple(ids)
