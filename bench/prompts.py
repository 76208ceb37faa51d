"""Prompt sets for the end-to-end benchmark.

``heldout``
    Problems the bundled model was not trained on, one a prompt.
``self-quoting``, ``novel``
    The held-out problems whose answers, plainly decoded, say again the most (the least) of what
    already stands in prompt and answer: by the share of the answer's 4-grams seen before. Few-shot
    prompts do not serve: the bundled model was trained on single problems and does not copy.
``unpredictable``
    The held-out problems at temperature 1: the worst case for a drafter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrt import builtin
from specrt.loading import load
from specrt.sampling import SamplingParams
from specrt.targets import BUILTIN

_CANDIDATES_EACH = 5  # problems looked at for each that is taken
HELDOUT = builtin.target_path().parent / "data" / "gsm8k_heldout.jsonl"


@dataclass(frozen=True)
class PromptSet:
    """Texts and how to sample their continuations."""

    texts: list[str]
    temperature: float = 0.0


def load_prompts(name: str, problems: Path, count: int, target: str = BUILTIN) -> PromptSet:
    """``count`` prompts of a set, evenly spaced over its source.

    Args:
        name: a set's name, or a JSONL file of ``{"prompt": text}`` or problems.
        problems: JSONL of ``{"question": ..., "answer": ...}``, what the named sets are made of.
        count: how many.
        target: whose answers tell self-quoting prompts from novel ones.

    Raises:
        SystemExit: there is no such file.
    """
    if name in ("heldout", "unpredictable"):
        texts = [_question(line) for line in _read(problems, count)]
        return PromptSet(texts, float(name == "unpredictable"))
    if name in ("self-quoting", "novel"):
        texts = [_question(line) for line in _read(problems, _CANDIDATES_EACH * count)]
        return PromptSet(_by_quoting(texts, target, most=name == "self-quoting")[:count])
    return PromptSet([_prompt(line) for line in _read(Path(name), count)])


def _read(file: Path, count: int) -> list[dict[str, Any]]:
    if not file.is_file():
        raise SystemExit(f"no prompts at {file}: name a JSONL file with --problems or --prompts")
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    step = max(1.0, len(lines) / count)
    return [json.loads(lines[int(i * step)]) for i in range(min(count, len(lines)))]


def _question(problem: Mapping[str, Any]) -> str:
    return f"Question: {problem['question']}\nAnswer:"


def _by_quoting(texts: list[str], target: str, *, most: bool) -> list[str]:
    """The texts by how much their plainly decoded answers repeat, most (or least) first."""
    engine = load(target, dtype="float32", progress=False)
    results = engine.generate(texts, SamplingParams(max_new_tokens=192))
    shares = {}
    for text, result in zip(texts, results, strict=True):
        tokens = result.prompt_token_ids + result.token_ids
        grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
        first = len(result.prompt_token_ids)
        seen = [grams[i] in grams[:i] for i in range(first, len(grams))]
        shares[text] = sum(seen) / max(1, len(seen))
    return sorted(texts, key=lambda text: shares[text], reverse=most)


def _prompt(line: Mapping[str, Any]) -> str:
    return str(line["prompt"]) if "prompt" in line else _question(line)
