"""``specrt generate``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import typer

from specrt.cli.errors import USER_ERROR, report

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.engine.prompts import Prompt
    from specrt.engine.results import GenerationResult, StreamChunk
    from specrt.sampling import SamplingParams
    from specrt.types import RoundStats


def stats_dict(stats: RoundStats) -> dict[str, Any]:
    """A result's statistics for JSON; ``tau`` is the mean of accept_length + 1 per round."""
    return {
        "tau": stats.tau,
        "accept_length": max(0.0, stats.tau - 1.0),
        "acceptance_rate": stats.acceptance_rate,
        "num_rounds": stats.num_rounds,
        "num_draft_tokens": stats.num_draft_tokens,
        "num_accepted_tokens": stats.num_accepted_tokens,
        "prefill_ms": stats.prefill_ms,
        "draft_ms": stats.draft_ms,
        "verify_ms": stats.verify_ms,
        "accept_ms": stats.accept_ms,
    }


def result_dict(index: int, result: GenerationResult) -> dict[str, Any]:
    """A result for JSON."""
    data: dict[str, Any] = {
        "index": index,
        "text": result.text,
        "token_ids": result.token_ids,
        "num_prompt_tokens": len(result.prompt_token_ids),
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "seed": result.seed,
    }
    if result.logprobs is not None:
        # JSON has no infinities.
        data["logprobs"] = [value if math.isfinite(value) else None for value in result.logprobs]
    if result.error is not None:
        data["error"] = result.error
    return {**data, "stats": stats_dict(result.stats)}


def write_results(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams], *, is_json: bool
) -> None:
    """Print each result when it and those before it are complete, in the order of the prompts.

    Raises:
        typer.Exit: with code 2, after everything was printed, if a sequence failed.
    """
    waiting: dict[int, GenerationResult] = {}
    errors: dict[int, str] = {}
    num_printed = 0
    with closing(engine.stream(prompts, sampling)) as chunks:
        for chunk in chunks:
            if chunk.result is None:
                continue
            waiting[chunk.index] = chunk.result
            while num_printed in waiting:
                result = waiting.pop(num_printed)
                _note_error(errors, num_printed, result)
                if is_json:
                    _print_json(result_dict(num_printed, result))
                else:
                    print(result.text, flush=True)
                num_printed += 1
    _end(errors)


def write_stream(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams], *, is_json: bool
) -> None:
    """Print text as rounds accept it, one prompt after another.

    With ``is_json`` each round is one object, and each result is one more as without streaming.

    Raises:
        typer.Exit: with code 2, after everything was printed, if a sequence failed.
    """
    errors: dict[int, str] = {}
    for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        with closing(engine.stream([prompt], params)) as chunks:
            for chunk in chunks:
                if is_json:
                    _print_json(_chunk_dict(index, chunk))
                else:
                    print(chunk.text, end="" if chunk.result is None else "\n", flush=True)
                if chunk.result is not None:
                    _note_error(errors, index, chunk.result)
                    if is_json:
                        _print_json(result_dict(index, chunk.result))
    _end(errors)


def _chunk_dict(index: int, chunk: StreamChunk) -> dict[str, Any]:
    return {
        "index": index,
        "chunk": chunk.text,
        "token_ids": chunk.token_ids,
        "num_accepted": chunk.num_accepted,
    }


def _print_json(data: Mapping[str, Any]) -> None:
    print(json.dumps(data), flush=True)


def _note_error(errors: dict[int, str], index: int, result: GenerationResult) -> None:
    if result.finish_reason == "error":
        errors[index] = result.error or "failed"


def _end(errors: Mapping[int, str]) -> None:
    for index, error in errors.items():
        report(f"prompt {index + 1}: {error}")
    if errors:
        raise typer.Exit(USER_ERROR)
