"""``/v1/completions``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from specrt.engine.results import GenerationResult, StreamChunk, TokenLogprob
from specrt.serve.answering import Answering
from specrt.serve.completion_fields import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from specrt.serve.errors import ApiError, JsonResponse, refused
from specrt.serve.sampling import sampling_params
from specrt.serve.service import Service, new_id
from specrt.serve.streaming import DONE, EventStream, TextEvent, event, round_report
from specrt.serve.token_texts import TokenTexts
from specrt.serve.usage import finish_reason, speculation_of, usage_of

_DEFAULT_TOKENS = 16  # OpenAI's
_SHORT = 2000
_NEVER = -9999.0  # OpenAI's word for no probability; JSON has no infinity


def completion_routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The route, for one service."""
    routes = APIRouter()

    @routes.post(
        "/v1/completions",
        response_model=CompletionAnswer,
        responses=errors,
        summary="How a text goes on",
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        try:
            answering = await _start(service, body, request)
        except ApiError as error:
            raise error.renamed(body.form_names()) from error
        if body.stream:
            writer = CompletionWriter(service, body, answering)
            options = service.options
            return EventStream(answering, writer, options.ping_seconds, options.request_seconds)
        results = await answering.whole(request.receive)
        answer = CompletionAnswer(
            id=new_id("cmpl", request),
            created=int(time.time()),
            model=service.name,
            choices=[
                _choice(service, body, number, result) for number, result in enumerate(results)
            ],
            usage=usage_of(answering.stream.prompt_ids, results, has_output=body.max_tokens != 0),
            x_specrt=speculation_of(results),
        )
        return JsonResponse(answer.model_dump())

    return routes


async def _start(service: Service, body: CompletionRequest, request: Request) -> Answering:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of: expected the same as n", "best_of")
    if body.stream and body.echo and body.logprobs is not None:
        raise ApiError(400, "echo: goes with logprobs where nothing is streamed", "echo")
    prompts = await _prompts(service, body)
    more: dict[str, Any] = {}
    if body.logprobs is not None:
        more = {"logprobs": True, "top_logprobs": body.logprobs}
        if body.echo:
            more["prompt_logprobs"] = body.logprobs
    longest = max(map(len, prompts))
    asked = 1 if body.max_tokens == 0 else body.max_tokens
    try:
        params = sampling_params(
            body,
            service.config.generation,
            service.max_tokens(asked, longest, _DEFAULT_TOKENS),
            body.whole_form(),
            service.cache_salt(request, body),
            more,
        )
    except ValueError as error:
        raise refused(error) from error
    draft = None if body.speculative is None else body.speculative.draft()
    return await service.answer(request, prompts, params, draft)


async def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    """The token ids of each prompt.

    Raises:
        ApiError: one is empty, too long, or has ids that are none.
    """
    given = body.prompt
    is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    prompts: list[Any] = [given] if is_one else list(given)
    if not prompts:
        raise ApiError(400, "prompt: expected at least one, got none", "prompt")
    has_bos = body.add_special_tokens is not False

    def encode() -> list[list[int]]:
        engine = service.engine.engine
        return [
            engine.encode(
                one,
                name="prompt" if is_one else f"prompt[{index}]",
                add_special_tokens=has_bos,
            )
            for index, one in enumerate(prompts)
        ]

    texts = [one for one in prompts if isinstance(one, str)]
    await service.check_texts(texts, "prompt")
    try:
        is_short = sum(map(len, prompts)) < _SHORT
        encoded = encode() if is_short else await asyncio.to_thread(encode)
    except ValueError as error:
        raise refused(error) from error
    for index, ids in enumerate(encoded):
        service.check_prompt(ids, "prompt" if is_one else f"prompt[{index}]")
    return encoded


# --- answers --------------------------------------------------------------------------------------


def _choice(
    service: Service, body: CompletionRequest, number: int, result: GenerationResult
) -> CompletionChoice:
    has_output = body.max_tokens != 0
    prompt = _echoed(service, result.prompt_token_ids) if body.echo else ""
    return CompletionChoice(
        index=number,
        text=prompt + (result.text if has_output else ""),
        logprobs=_logprobs(service, body, result, has_output),
        finish_reason=finish_reason(result) if has_output else "length",  # type: ignore[arg-type]
        stop_reason=result.stop_reason if has_output else None,
    )


def _echoed(service: Service, ids: Sequence[int]) -> str:
    return service.tokenizer.decode(ids)


def _logprobs(
    service: Service, body: CompletionRequest, result: GenerationResult, has_output: bool
) -> CompletionLogprobs | None:
    if body.logprobs is None:
        return None
    ids: list[int] = []
    values: list[float | None] = []
    top: list[Sequence[TokenLogprob]] = []
    if body.echo:
        ids += result.prompt_token_ids
        values += result.prompt_logprobs or []
        top += result.prompt_top_logprobs or []
    if has_output:
        ids += result.token_ids
        values += result.logprobs or []
        top += result.top_logprobs or [()] * len(result.token_ids)
    return logprobs_of(ids, values, top, service.texts)


def logprobs_of(
    ids: Sequence[int],
    values: Sequence[float | None],
    top: Sequence[Sequence[TokenLogprob]],
    texts: TokenTexts,
    start: int = 0,
) -> CompletionLogprobs:
    """Log-probabilities in OpenAI's old form; ``start`` is where the first token's text begins."""
    tokens = [texts.text_of(token) for token in ids]
    offsets = list(accumulate(map(len, tokens), initial=start))[: len(tokens)]
    likeliest: list[dict[str, float] | None] = []
    for token, value, ones in zip(ids, values, top, strict=False):
        if value is None:
            likeliest.append(None)
            continue
        found = {texts.text_of(one): max(logprob, _NEVER) for one, logprob in ones}
        likeliest.append({texts.text_of(token): max(value, _NEVER), **found})
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[None if value is None else max(value, _NEVER) for value in values],
        top_logprobs=likeliest,
        text_offset=offsets,
    )


# --- streams --------------------------------------------------------------------------------------


@dataclass(eq=False)
class CompletionWriter:
    """The events of a streamed answer."""

    service: Service
    body: CompletionRequest
    answering: Answering

    def __post_init__(self) -> None:
        body, options = self.body, self.body.stream_options
        self._n = body.n or 1
        self._has_usage = options is not None and bool(options.include_usage)
        self._has_rounds = body.x_specrt is not None and bool(body.x_specrt.trees)
        self._sizes = [0] * (self._n * len(self.answering.stream.params))
        self._head = {
            "id": new_id("cmpl", self.answering.request),
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.service.name,
        }
        self._plain = [
            TextEvent(partial(self._event, number)) for number in range(len(self._sizes))
        ]

    def opening(self) -> bytes:
        """The prompts, if they are to be echoed."""
        if not self.body.echo:
            return b""
        prompts = self.answering.stream.prompt_ids
        texts = [_echoed(self.service, ids) for ids in prompts for _ in range(self._n)]
        return b"".join(self._event(number, text) for number, text in enumerate(texts))

    def chunk(self, chunk: StreamChunk) -> bytes:
        """New text, and the end of a choice."""
        if self.body.max_tokens == 0:
            return self._end(chunk, "") if chunk.result is not None else b""
        number = chunk.index * self._n + chunk.choice
        report = round_report(chunk, self.service.texts) if self._has_rounds else None
        logprobs = None
        if self.body.logprobs is not None and chunk.token_ids:
            none: list[Sequence[TokenLogprob]] = [()] * len(chunk.token_ids)
            top = chunk.top_logprobs or none
            made = logprobs_of(
                chunk.token_ids, chunk.logprobs or (), top, self.service.texts, self._sizes[number]
            )
            self._sizes[number] += sum(map(len, made.tokens))
            logprobs = made.model_dump()
        if logprobs is None and report is None:
            data = self._plain[number].of(chunk.text) if chunk.text else b""
        else:
            data = self._event(number, chunk.text, logprobs=logprobs, report=report)
        return data + (self._end(chunk, None) if chunk.result is not None else b"")

    def closing(self) -> bytes:
        """Usage, if asked for, and the end."""
        if not self._has_usage:
            return DONE
        answering = self.answering
        usage = usage_of(
            answering.stream.prompt_ids,
            answering.in_order(),
            has_output=self.body.max_tokens != 0,
        )
        return event({**self._head, "choices": [], "usage": usage.model_dump()}) + DONE

    def failing(self, error: ApiError) -> bytes:
        """An error's event."""
        return event(error.body()) + DONE

    def _end(self, chunk: StreamChunk, reason: str | None) -> bytes:
        result = chunk.result
        assert result is not None, "the chunk is a choice's last"
        if result.error is not None:
            return b""
        number = chunk.index * self._n + chunk.choice
        said = finish_reason(result) if reason is None else "length"
        report = speculation_of([result]).model_dump()
        return self._event(number, "", reason=said, report=report)

    def _event(
        self,
        number: int,
        text: str,
        *,
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        report: dict[str, Any] | None = None,
    ) -> bytes:
        one = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
        data: dict[str, Any] = {**self._head, "choices": [one]}
        if self._has_usage:
            data["usage"] = None
        if report is not None:
            data["x_specrt"] = report
        return event(data)
