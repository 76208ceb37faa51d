"""Prompts from the command line, a file or a pipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specrt.engine import Engine
    from specrt.prompts import Prompt

STDIN = "-"


def read_prompts(
    prompt: str | None, file: str | None, *, is_jsonl: bool, is_chat: bool
) -> list[tuple[str, Prompt]]:
    """The prompts asked for, each with the name that error messages give it.

    Args:
        prompt: the text itself, or None.
        file: a path, ``"-"`` for stdin, or None; with neither, text comes from a pipe.
        is_jsonl: one JSON object per line; taken as given where the name ends in ``.jsonl``.
        is_chat: texts are user messages.

    Raises:
        ValueError: both or neither were given, or a line is not what it should be.
        OSError: the file cannot be read.
    """
    if prompt is not None and file is not None:
        raise ValueError("prompt: expected --prompt or --file, got both")
    if prompt is not None:
        return [("prompt", _as_chat(prompt, is_chat))]
    name, text = _read(file)
    if is_jsonl or name.endswith(".jsonl"):
        return _parse_lines(name, text, is_chat)
    # Editors end a file with a newline that is not meant as part of the prompt.
    return [(name, _as_chat(text.removesuffix("\n").removesuffix("\r"), is_chat))]


def bundled_prompts(count: int) -> list[tuple[str, Prompt]]:
    """Problems the bundled target has not seen.

    Raises:
        ValueError: there are not so many.
    """
    from specrt.builtin import heldout_prompts

    try:
        found = heldout_prompts(count)
    except ValueError as error:
        raise ValueError(f"num_prompts: {str(error).removeprefix('count: ')}") from error
    return [(f"problem {i}", text) for i, text in enumerate(found, start=1)]


def encode(engine: Engine, prompts: list[tuple[str, Prompt]]) -> list[Prompt]:
    """The prompts as token ids.

    Raises:
        ValueError: a prompt is empty or does not fit the chat template; names it.
    """
    encoded: list[Prompt] = []
    for name, prompt in prompts:
        try:
            encoded.append(engine.encode(prompt))
        except ValueError as error:
            reason = str(error).removeprefix("prompt: ")
            raise ValueError(f"{name}: {reason}") from error
    return encoded


def _read(file: str | None) -> tuple[str, str]:
    if file is None and sys.stdin.isatty():
        raise ValueError("prompt: expected --prompt TEXT, --file FILE or text on stdin, got none")
    is_stdin = file is None or file == STDIN
    name = "stdin" if is_stdin else str(file)
    data = sys.stdin.buffer.read() if is_stdin else Path(name).read_bytes()
    try:
        return name, data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8 text: {error}") from error


def _as_chat(text: str, is_chat: bool) -> Prompt:
    return [{"role": "user", "content": text}] if is_chat else text


def _parse_lines(name: str, text: str, is_chat: bool) -> list[tuple[str, Prompt]]:
    prompts = [
        (f"{name}, line {number}", _parse_line(f"{name}, line {number}", line, is_chat))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{name}: expected one JSON object per line, got no lines")
    return prompts


def _parse_line(where: str, line: str, is_chat: bool) -> Prompt:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    given = [key for key in ("prompt", "messages") if isinstance(data, dict) and key in data]
    if len(given) != 1:
        raise ValueError(f'{where}: expected an object with either "prompt" or "messages"')
    value = data[given[0]]
    if given == ["prompt"]:
        if not isinstance(value, str):
            raise ValueError(f'{where}: "prompt": expected text, got {type(value).__name__}')
        return _as_chat(value, is_chat)
    if not _is_messages(value):
        raise ValueError(f'{where}: "messages": expected objects with "role" and "content"')
    messages: Prompt = value
    return messages


def _is_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value)
    )
