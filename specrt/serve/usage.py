"""What an answer tells of its tokens and rounds."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from specrt.engine.results import GenerationResult


class PromptTokensDetails(BaseModel):
    """Of ``prompt_tokens``."""

    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    """Of ``completion_tokens``: drafted ones are OpenAI's predictions."""

    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    reasoning_tokens: int = 0
    audio_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Speculation(BaseModel):
    """What drafting was worth, over a request's answers."""

    rounds: int
    drafted: int
    accepted: int
    tau: float
    """Tokens a round."""
    seed: int
    """Of the first answer; given with the request again, the text comes again."""
    cached_tokens: int
    prefill_ms: float
    round_ms: float


def usage_of(
    prompts: Sequence[Sequence[int]],
    results: Sequence[GenerationResult],
    *,
    has_output: bool = True,
) -> Usage:
    """Tokens of prompts, each counted once, and of their answers, if these were asked for."""
    stats = [result.stats for result in results]
    num_prompt = sum(map(len, prompts))
    num_output = sum(len(result.token_ids) for result in results) if has_output else 0
    drafted = sum(one.num_draft_tokens for one in stats)
    accepted = sum(one.num_accepted_tokens for one in stats)
    # Of several answers to a prompt the later ones find what the first one has computed.
    cached = sum(one.stats.num_cached_tokens for one in results if one.choice == 0)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_output,
        total_tokens=num_prompt + num_output,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=min(cached, num_prompt)),
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=accepted,
            rejected_prediction_tokens=max(0, drafted - accepted),
        ),
    )


def speculation_of(results: Sequence[GenerationResult]) -> Speculation:
    """Counts of all answers' rounds."""
    stats = [result.stats for result in results]
    rounds = sum(one.num_rounds for one in stats)
    num_tokens = sum(one.num_rounds + one.num_accepted_tokens for one in stats)
    spent = sum(one.draft_ms + one.verify_ms + one.accept_ms for one in stats)
    return Speculation(
        rounds=rounds,
        drafted=sum(one.num_draft_tokens for one in stats),
        accepted=sum(one.num_accepted_tokens for one in stats),
        tau=round(num_tokens / rounds, 4) if rounds else 0.0,
        seed=results[0].seed if results else 0,
        cached_tokens=sum(one.num_cached_tokens for one in stats),
        prefill_ms=round(sum(one.prefill_ms for one in stats), 3),
        round_ms=round(spent, 3),
    )


def finish_reason(result: GenerationResult) -> str:
    """OpenAI's word for how an answer ended."""
    return "stop" if result.finish_reason == "stop" else "length"
