"""Prompt sets for the end-to-end benchmark.

``heldout``
    Problems the bundled model was not trained on, one a prompt.
``self-quoting``
    The answer's first line stands there four times: models go on repeating it, which can be
    looked up.
``unpredictable``
    The held-out problems at temperature 1: the worst case for a drafter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrt.load import builtin_path

HELDOUT = builtin_path().parent / "data" / "gsm8k_heldout.jsonl"


@dataclass(frozen=True)
class PromptSet:
    """Texts and how to sample their continuations."""

    texts: list[str]
    temperature: float = 0.0


def load_prompts(name: str, problems: Path, count: int) -> PromptSet:
    """The first ``count`` prompts of a set.

    Args:
        name: a set's name, or a JSONL file of ``{"prompt": text}`` or problems.
        problems: JSONL of ``{"question": ..., "answer": ...}``, what the named sets are made of.
        count: how many.

    Raises:
        SystemExit: there is no such file.
    """
    if name in _SETS:
        lines = _read(problems)[:count]
        return PromptSet([_SETS[name](line) for line in lines], float(name == "unpredictable"))
    return PromptSet([_prompt(line) for line in _read(Path(name))[:count]])


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise SystemExit(f"no prompts at {file}: name a JSONL file with --problems or --prompts")
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def _question(problem: Mapping[str, Any]) -> str:
    return f"Question: {problem['question']}\nAnswer:"


def _quoted(problem: Mapping[str, Any]) -> str:
    line = str(problem["answer"]).split("\n", 1)[0]
    return f"{_question(problem)}{f' {line}' * 4}"


def _prompt(line: Mapping[str, Any]) -> str:
    return str(line["prompt"]) if "prompt" in line else _question(line)


_SETS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "heldout": _question,
    "self-quoting": _quoted,
    "unpredictable": _question,
}
