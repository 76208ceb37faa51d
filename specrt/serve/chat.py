"""``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from specrt.engine.results import GenerationResult, StreamChunk, TokenLogprob
from specrt.sampling import StructuredOutput
from specrt.serve.answering import Answering
from specrt.serve.chat_fields import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatRequest,
    ChoiceLogprobs,
    Message,
    TokenLogprobs,
    TokenOfLogprobs,
)
from specrt.serve.errors import ApiError, JsonResponse, refused
from specrt.serve.sampling import sampling_params
from specrt.serve.service import Service, new_id
from specrt.serve.streaming import DONE, EventStream, TextEvent, event, round_report
from specrt.serve.token_texts import TokenTexts
from specrt.serve.tools import CallReader, ToolCall, forced_form
from specrt.serve.usage import finish_reason, speculation_of, usage_of

_SHORT = 2000


def chat_routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The route, for one service."""
    routes = APIRouter()

    @routes.post(
        "/v1/chat/completions",
        response_model=ChatAnswer,
        responses=errors,
        summary="The next turn of a conversation",
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        answering = await start_chat(service, body, request)
        if body.stream:
            writer = ChatWriter(service, body, answering)
            options = service.options
            return EventStream(answering, writer, options.ping_seconds, options.request_seconds)
        results = await answering.whole(request.receive)
        return JsonResponse(_answer(service, body, answering, results).model_dump())

    return routes


async def start_chat(service: Service, body: ChatRequest, request: Request) -> Answering:
    """Have a conversation answered.

    Args:
        service: by which.
        body: the conversation.
        request: of HTTP.

    Raises:
        ApiError: it is refused, or there is no room.
    """
    try:
        return await _start(service, body, request)
    except ApiError as error:
        raise error.renamed(body.form_names()) from error


async def _start(service: Service, body: ChatRequest, request: Request) -> Answering:
    try:
        form = _form(body)
        ids = await prompt_ids(service, body)
    except ValueError as error:
        raise refused_messages(error) from error
    service.check_prompt(ids, "messages")
    default = service.config.generation.max_new_tokens
    asked = body.max_completion_tokens or body.max_tokens
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs: goes with logprobs: true", "top_logprobs")
    try:
        params = sampling_params(
            body,
            service.config.generation,
            service.max_tokens(asked, len(ids), default),
            form,
            service.cache_salt(request, body),
            {"logprobs": bool(body.logprobs), "top_logprobs": body.top_logprobs or 0},
        )
    except ValueError as error:
        raise refused(error) from error
    draft = None if body.speculative is None else body.speculative.draft()
    return await service.answer(request, [ids], params, draft)


def _form(body: ChatRequest) -> StructuredOutput | None:
    """What the text is to conform to.

    Raises:
        ValueError: several things are asked for, or one is none that can be.
    """
    given = body.form()
    if body.response_format is not None and body.response_format.type != "text":
        if given is not None:
            raise ValueError("response_format: expected it alone, got structured_outputs besides")
        given = body.response_format.form()
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise ValueError("tools: expected the tools that tool_choice asks for, got none")
        return given
    if is_forced(body):
        if given is not None:
            raise ValueError("tool_choice: a call has a form of its own, got response_format too")
        assert body.tool_choice is not None, "it forces a call"
        return forced_form(body.tools, body.tool_choice)
    return given


def is_forced(body: ChatRequest) -> bool:
    """Whether the answer is to be a call of a tool."""
    return bool(body.tools) and body.tool_choice not in (None, "none", "auto")


async def prompt_ids(service: Service, body: ChatRequest) -> list[int]:
    """The conversation's token ids.

    Raises:
        ValueError: the template refuses it.
    """
    texts = [m.content for m in body.messages if isinstance(m.content, str)]
    await service.check_texts(texts, "messages")
    messages = [_plain(message) for message in body.messages]
    offers = bool(body.tools) and body.tool_choice != "none"
    if is_forced(body):  # the text's form makes the call, whatever the template says
        offers = service.tokenizer.takes_tools
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if offers else None
    render = partial(
        service.tokenizer.apply_chat_template,
        messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        tools=tools,
        options=body.chat_template_kwargs,
    )
    size = sum(len(m.content) if isinstance(m.content, str) else _SHORT for m in body.messages)
    is_short = size < _SHORT and tools is None
    return render() if is_short else await asyncio.to_thread(render)


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates take it: calls' arguments as data, OpenAI's new word for system."""
    plain = message.model_dump(exclude_unset=True)
    if plain["role"] == "developer":
        plain["role"] = "system"
    if plain.get("content") is None and plain.get("tool_calls"):
        plain["content"] = None
    for call in plain.get("tool_calls") or ():
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):  # it stays what it is: some templates take text
                continue
    return plain


def refused_messages(error: ValueError) -> ApiError:
    """A template's or a message's error; OpenAI calls the field messages."""
    message = str(error).removeprefix("prompt: ")
    name, _, rest = message.partition(": ")
    if name.startswith("messages[") and rest:
        part, _, reason = rest.partition(": ")
        if part.startswith("content["):
            return ApiError(400, f"{name}.{part}: {reason}", f"{name}.{part}")
        return ApiError(400, message, name)
    if str(error).startswith("prompt: "):
        return ApiError(400, f"messages: {message}", "messages")
    return refused(error)


# --- answers --------------------------------------------------------------------------------------


def _answer(
    service: Service, body: ChatRequest, answering: Answering, results: Sequence[GenerationResult]
) -> ChatAnswer:
    return ChatAnswer(
        id=new_id("chatcmpl", answering.request),
        created=int(time.time()),
        model=service.name,
        choices=[_choice(service, body, result) for result in results],
        usage=usage_of(answering.stream.prompt_ids, results),
        x_specrt=speculation_of(results),
    )


def _choice(service: Service, body: ChatRequest, result: GenerationResult) -> ChatChoice:
    reason = finish_reason(result)
    text, calls = calls_in(body, result.text)
    if calls and reason == "stop":
        reason = "tool_calls"
    logprobs = None
    if body.logprobs:
        content = logprobs_of(
            result.token_ids, result.logprobs or (), result.top_logprobs, service.texts
        )
        logprobs = ChoiceLogprobs(content=content)
    return ChatChoice(
        index=result.choice,
        message=AnswerMessage(content=text, tool_calls=calls or None),
        logprobs=logprobs,
        finish_reason=reason,  # type: ignore[arg-type]
        stop_reason=result.stop_reason,
    )


def reader_of(body: ChatRequest) -> CallReader | None:
    """What tells calls from text, where there may be any."""
    if not body.tools or body.tool_choice == "none":
        return None
    names = [tool.function.name for tool in body.tools]
    return CallReader(names, is_forced=is_forced(body))


def calls_in(body: ChatRequest, text: str) -> tuple[str | None, list[ToolCall]]:
    """A whole text without its calls (None: it is nothing else), and these."""
    reader = reader_of(body)
    if reader is None:
        return text, []
    shown = reader.feed(text)
    rest, calls = reader.end()
    if not calls:
        return text, []
    return (shown + rest).strip() or None, wanted_calls(body, calls)


def wanted_calls(body: ChatRequest, calls: list[ToolCall]) -> list[ToolCall]:
    """Those that an answer may have."""
    return calls[:1] if body.parallel_tool_calls is False else calls


def logprobs_of(
    ids: Sequence[int],
    logprobs: Sequence[float],
    top: Sequence[Sequence[TokenLogprob]] | None,
    texts: TokenTexts,
) -> list[TokenLogprobs]:
    """Log-probabilities in OpenAI's form."""
    likeliest = top if top is not None else [()] * len(ids)
    return [
        TokenLogprobs(
            **_token(texts, token, logprob),
            top_logprobs=[TokenOfLogprobs(**_token(texts, *one)) for one in ones],
        )
        for token, logprob, ones in zip(ids, logprobs, likeliest, strict=False)
    ]


def _token(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": texts.text_of(token),
        "logprob": max(logprob, -9999.0),  # OpenAI's word for never; JSON has no infinity
        "bytes": list(texts.bytes_of(token)),
    }


# --- streams --------------------------------------------------------------------------------------


@dataclass(eq=False)
class ChatWriter:
    """The events of a streamed answer."""

    service: Service
    body: ChatRequest
    answering: Answering
    _readers: dict[int, CallReader | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        body = self.body
        options = body.stream_options
        self._has_usage = options is not None and bool(options.include_usage)
        self._has_rounds = body.x_specrt is not None and bool(body.x_specrt.trees)
        self._readers = {choice: reader_of(body) for choice in range(body.n or 1)}
        self._head = {
            "id": new_id("chatcmpl", self.answering.request),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self.service.name,
            "system_fingerprint": None,
        }
        self._plain = [TextEvent(partial(self._said, choice)) for choice in self._readers]

    def opening(self) -> bytes:
        """The role of each choice."""
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._event(choice, delta) for choice in self._readers)

    def chunk(self, chunk: StreamChunk) -> bytes:
        """New text, and the end of a choice."""
        reader, text = self._readers[chunk.choice], chunk.text
        if reader is not None:
            text = reader.feed(text)
        logprobs = self._logprobs(chunk)
        report = round_report(chunk, self.service.texts) if self._has_rounds else None
        data = b""
        if logprobs is None and report is None:
            data = self._plain[chunk.choice].of(text) if text else b""
        else:
            delta = {"content": text}
            data = self._event(chunk.choice, delta, logprobs=logprobs, report=report)
        if chunk.result is not None:
            data += self._end(chunk.choice, chunk.result, reader)
        return data

    def closing(self) -> bytes:
        """Usage, if asked for, and the end."""
        if not self._has_usage:
            return DONE
        answering = self.answering
        usage = usage_of(answering.stream.prompt_ids, answering.in_order())
        return event({**self._head, "choices": [], "usage": usage.model_dump()}) + DONE

    def failing(self, error: ApiError) -> bytes:
        """An error's event."""
        return event(error.body()) + DONE

    def _end(self, choice: int, result: GenerationResult, reader: CallReader | None) -> bytes:
        if result.error is not None:
            return b""
        data, reason = b"", finish_reason(result)
        if reader is not None:
            rest, calls = reader.end()
            if rest:
                data += self._event(choice, {"content": rest})
            if calls:
                wanted = enumerate(wanted_calls(self.body, calls))
                given = [{"index": i, **call.model_dump()} for i, call in wanted]
                data += self._event(choice, {"tool_calls": given})
                reason = "tool_calls" if reason == "stop" else reason
        report = speculation_of([result]).model_dump()
        return data + self._event(choice, {}, reason=reason, report=report)

    def _said(self, choice: int, text: str) -> bytes:
        return self._event(choice, {"content": text})

    def _logprobs(self, chunk: StreamChunk) -> dict[str, Any] | None:
        if not self.body.logprobs or not chunk.token_ids:
            return None
        content = logprobs_of(
            chunk.token_ids, chunk.logprobs or (), chunk.top_logprobs, self.service.texts
        )
        return ChoiceLogprobs(content=content).model_dump()

    def _event(
        self,
        choice: int,
        delta: dict[str, Any],
        *,
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        report: dict[str, Any] | None = None,
    ) -> bytes:
        one = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        data = {**self._head, "choices": [one]}
        if self._has_usage:
            data["usage"] = None
        if report is not None:
            data["x_specrt"] = report
        return event(data)
