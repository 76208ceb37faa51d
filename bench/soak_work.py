"""What a soak's clients ask for, and what plain decoding says to it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import specrt
from bench.prompts import HELDOUT, load_prompts
from specrt import SamplingParams, StructuredOutput
from specrt.engine.engine import Engine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ONE, CHOICES, STRUCTURED, LONG = "one", "choices", "structured", "long"
_PREAMBLE = "Question: What is 3 + 4?\nAnswer: 7\n" * 12
_SCHEMAS: tuple[dict[str, Any], ...] = (
    {
        "type": "object",
        "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["count"],
        "additionalProperties": False,
    },
    {"enum": ["yes", "no", "perhaps"]},
)


@dataclass(frozen=True)
class Work:
    """A request, and its right answer."""

    kind: str
    path: str
    body: dict[str, Any]
    prompt: Any
    """As an engine takes it."""
    params: SamplingParams
    texts: tuple[str, ...] = ()
    """Of its choices, plainly decoded."""


def make_works(count: int, seed: int, *, is_short: bool = False) -> list[Work]:
    """Requests of all kinds, without their answers: a fixed function of the arguments.

    Args:
        is_short: a few tokens each, for tests.
    """
    rng = random.Random(seed)
    questions = load_prompts("heldout", HELDOUT, min(count, 400)).texts
    kinds = (ONE, ONE, ONE, ONE, ONE, ONE, ONE, CHOICES, STRUCTURED, LONG)
    return [
        _work(kinds[number % len(kinds)], questions[number % len(questions)], rng, is_short)
        for number in range(count)
    ]


def _work(kind: str, question: str, rng: random.Random, is_short: bool) -> Work:
    most = 8 if is_short else 24
    options: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.7, 1.0]),
        "top_p": rng.choice([1.0, 0.9]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.5]),
        "seed": rng.randrange(2**31),
        "n": rng.choice([2, 3]) if kind == CHOICES else 1,
    }
    max_tokens = rng.randrange(2, most)
    form: StructuredOutput | None = None
    body: dict[str, Any] = {}
    if kind == STRUCTURED:
        schema = rng.choice(_SCHEMAS)
        max_tokens, form = 24, StructuredOutput(json_schema=schema)
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        }
    elif kind == LONG:
        max_tokens = most if is_short else 160
        body["logprobs"] = 10  # and so some hundred bytes a token
    is_chat = kind != LONG and rng.random() < 0.3
    if kind == STRUCTURED and not is_chat:
        body["structured_outputs"] = {"json": body.pop("response_format")["json_schema"]["schema"]}
    body |= {**options, "max_tokens": max_tokens}
    params = SamplingParams(max_new_tokens=max_tokens, structured=form, **options)
    text = question if rng.random() < 0.7 else _PREAMBLE + question
    if is_chat:
        asked = question.removeprefix("Question: ").removesuffix("\nAnswer:")
        messages = [{"role": "user", "content": asked}]
        return Work(kind, CHAT, {**body, "messages": messages}, messages, params)
    return Work(kind, COMPLETIONS, {**body, "prompt": text}, text, params)


def with_answers(works: Sequence[Work], engine: Engine) -> list[Work]:
    """The same with what an engine says to each."""
    ids = [engine.encode(work.prompt) for work in works]
    results = iter(engine.generate(ids, [work.params for work in works]))
    return [
        replace(work, texts=tuple(next(results).text for _ in range(work.params.n)))
        for work in works
    ]


def plain_engine(target: str) -> Engine:
    """The reference: no drafter, float32."""
    return specrt.load(target, dtype="float32", progress=False, max_batch=16)
