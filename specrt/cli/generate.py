"""``specrt generate``."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from specrt.cli.errors import USER_ERROR, report

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.engine.prompts import Prompt
    from specrt.engine.results import GenerationResult, StreamChunk, TokenLogprob
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


def result_dict(index: int, choice: int, result: GenerationResult) -> dict[str, Any]:
    """A result for JSON."""
    data: dict[str, Any] = {
        "index": index,
        "choice": choice,
        "text": result.text,
        "token_ids": result.token_ids,
        "num_prompt_tokens": len(result.prompt_token_ids),
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "seed": result.seed,
    }
    data |= _logprobs_dict(result)
    if result.prompt_logprobs is not None:
        data["prompt_logprobs"] = [_finite(value) for value in result.prompt_logprobs]
    if result.prompt_top_logprobs is not None:
        data["prompt_top_logprobs"] = _top_list(result.prompt_top_logprobs)
    if result.error is not None:
        data["error"] = result.error
    return {**data, "stats": stats_dict(result.stats)}


def _logprobs_dict(told: GenerationResult | StreamChunk) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if told.logprobs is not None:
        data["logprobs"] = [_finite(value) for value in told.logprobs]
    if told.top_logprobs is not None:
        data["top_logprobs"] = _top_list(told.top_logprobs)
    return data


def _top_list(places: Sequence[Sequence[TokenLogprob]]) -> list[list[dict[str, Any]]]:
    return [
        [{"token_id": one.token_id, "logprob": _finite(one.logprob)} for one in place]
        for place in places
    ]


def _finite(value: float | None) -> float | None:
    """JSON has no infinities."""
    return value if value is not None and math.isfinite(value) else None


def write_results(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams], *, is_json: bool
) -> None:
    """Print each result when it and those before it are complete, in the order of the prompts and
    of each prompt's answers.

    Raises:
        typer.Exit: with code 2, after everything was printed, if a sequence failed.
    """
    waiting: dict[tuple[int, int], GenerationResult] = {}
    errors: dict[int, str] = {}
    places = deque((index, choice) for index, one in enumerate(sampling) for choice in range(one.n))
    with closing(engine.stream(prompts, sampling)) as chunks:
        for chunk in chunks:
            if chunk.result is None:
                continue
            waiting[chunk.index, chunk.choice] = chunk.result
            while places and places[0] in waiting:
                index, choice = places.popleft()
                result = waiting.pop((index, choice))
                _note_error(errors, index, result)
                if is_json:
                    _print_json(result_dict(index, choice, result))
                else:
                    print(result.text, flush=True)
    _end(errors)


def write_stream(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams], *, is_json: bool
) -> None:
    """Print text as rounds accept it, one answer after another.

    With ``is_json`` each round is one object, and each result is one more as without streaming.

    Raises:
        typer.Exit: with code 2, after everything was printed, if a sequence failed.
    """
    errors: dict[int, str] = {}
    for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        for choice, one in enumerate(params.choices()):
            with closing(engine.stream([prompt], one, n=1)) as chunks:
                for chunk in chunks:
                    _write_chunk(index, choice, chunk, is_json=is_json)
                    if chunk.result is not None:
                        _note_error(errors, index, chunk.result)
    _end(errors)


def _write_chunk(index: int, choice: int, chunk: StreamChunk, *, is_json: bool) -> None:
    if not is_json:
        print(chunk.text, end="" if chunk.result is None else "\n", flush=True)
        return
    data: dict[str, Any] = {
        "index": index,
        "choice": choice,
        "chunk": chunk.text,
        "token_ids": chunk.token_ids,
        "num_accepted": chunk.num_accepted,
    }
    data |= _logprobs_dict(chunk)
    if chunk.tree is not None:
        data["tree"] = asdict(chunk.tree)
    _print_json(data)
    if chunk.result is not None:
        _print_json(result_dict(index, choice, chunk.result))


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
