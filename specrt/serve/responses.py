"""``/v1/responses``: OpenAI's newer form of a conversation's next turn, as far as it is text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from specrt.engine.results import GenerationResult, StreamChunk
from specrt.serve.answering import Answering
from specrt.serve.chat import start_chat
from specrt.serve.chat_fields import ChatRequest, Message
from specrt.serve.errors import ApiError, JsonResponse
from specrt.serve.fields import JsonSchemaFormat, ResponseFormat, SamplingFields
from specrt.serve.response_fields import (
    IncompleteDetails,
    InputTokensDetails,
    OutputMessage,
    OutputText,
    ResponseAnswer,
    ResponseRequest,
    ResponseUsage,
)
from specrt.serve.service import Service, new_id
from specrt.serve.streaming import EventStream, event
from specrt.serve.usage import finish_reason, speculation_of, usage_of


def response_routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The route, for one service."""
    routes = APIRouter()

    @routes.post(
        "/v1/responses",
        response_model=ResponseAnswer,
        responses=errors,
        summary="The next turn of a conversation, in the newer form",
    )
    async def responses(body: ResponseRequest, request: Request) -> Response:
        service.check_model(body.model)
        answering = await start_chat(service, _as_chat(body), request, names=_NAMES)
        made = ResponseMaker(service, body, answering)
        if body.stream:
            options = service.options
            return EventStream(
                answering, ResponseWriter(made), options.ping_seconds, options.request_seconds
            )
        results = await answering.whole(request.receive)
        return JsonResponse(made.answer(results[0]).model_dump())

    return routes


_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}


def _as_chat(body: ResponseRequest) -> ChatRequest:
    """The same as a request of the older form."""
    if not body.input:
        raise ApiError(400, "input: expected a text or turns, got none", "input")
    turns: list[Message] = []
    if body.instructions is not None:
        turns.append(Message(role="system", content=body.instructions))
    if isinstance(body.input, str):
        turns.append(Message(role="user", content=body.input))
    else:
        turns += [Message(role=item.role, content=item.content) for item in body.input]
    shared = {name: getattr(body, name) for name in SamplingFields.model_fields}
    return ChatRequest(
        **{name: value for name, value in shared.items() if value is not None},
        messages=turns,
        max_tokens=body.max_output_tokens,
        response_format=_format(body),
    )


def _format(body: ResponseRequest) -> ResponseFormat | None:
    given = None if body.text is None else body.text.format
    if given is None:
        return None
    if given.type != "json_schema":
        return ResponseFormat(type=given.type)
    schema = JsonSchemaFormat(name=given.name, schema=given.schema_)
    return ResponseFormat(type="json_schema", json_schema=schema)


@dataclass(eq=False)
class ResponseMaker:
    """Makes the response object of an answer, at any state of it."""

    service: Service
    body: ResponseRequest
    answering: Answering

    def __post_init__(self) -> None:
        self.id = new_id("resp", self.answering.request)
        self.message_id = new_id("msg", self.answering.request)
        self._created = int(time.time())

    def message(self, result: GenerationResult) -> OutputMessage:
        """The answer's one message."""
        whole = finish_reason(result) == "stop"
        return OutputMessage(
            id=self.message_id,
            status="completed" if whole else "incomplete",
            content=[OutputText(text=result.text)],
        )

    def answer(self, result: GenerationResult | None) -> ResponseAnswer:
        """The whole; without a result as it is at the beginning."""
        body, params = self.body, self.answering.stream.params[0][0]
        text = {"format": {"type": "text"}}
        if body.text is not None:
            text |= body.text.model_dump(exclude_none=True, by_alias=True)
        made = ResponseAnswer(
            id=self.id,
            created_at=self._created,
            status="in_progress",
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=self.service.name,
            output=[],
            temperature=params.temperature,
            top_p=params.top_p,
            text=text,
            metadata=body.metadata or {},
        )
        if result is None:
            return made
        message = self.message(result)
        whole = message.status == "completed"
        return made.model_copy(
            update={
                "status": message.status,
                "incomplete_details": None if whole else IncompleteDetails(),
                "output": [message],
                "usage": self._usage([result]),
                "x_specrt": speculation_of([result]),
            }
        )

    def _usage(self, results: Sequence[GenerationResult]) -> ResponseUsage:
        usage = usage_of(self.answering.stream.prompt_ids, results)
        cached = usage.prompt_tokens_details.cached_tokens
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=cached),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )


class ResponseWriter:
    """The events of a streamed response.

    Args:
        maker: of its objects.
    """

    def __init__(self, maker: ResponseMaker) -> None:
        self._maker = maker
        self._count = 0
        self._place = {"item_id": maker.message_id, "output_index": 0, "content_index": 0}

    def opening(self) -> bytes:
        """That it began, and what it is made of."""
        begun = {"response": self._maker.answer(None).model_dump()}
        item = OutputMessage(id=self._maker.message_id, status="in_progress", content=[])
        return b"".join(
            (
                self._event("response.created", begun),
                self._event("response.in_progress", begun),
                self._event(
                    "response.output_item.added", {"output_index": 0, "item": item.model_dump()}
                ),
                self._event(
                    "response.content_part.added",
                    {**self._place, "part": OutputText(text="").model_dump()},
                ),
            )
        )

    def chunk(self, chunk: StreamChunk) -> bytes:
        """New text."""
        if not chunk.text:
            return b""
        data = {**self._place, "delta": chunk.text, "logprobs": []}
        return self._event("response.output_text.delta", data)

    def closing(self) -> bytes:
        """The whole."""
        maker = self._maker
        (result,) = maker.answering.in_order()
        message = maker.message(result)
        answer = maker.answer(result)
        return b"".join(
            (
                self._event(
                    "response.output_text.done",
                    {**self._place, "text": result.text, "logprobs": []},
                ),
                self._event(
                    "response.content_part.done",
                    {**self._place, "part": message.content[0].model_dump()},
                ),
                self._event(
                    "response.output_item.done", {"output_index": 0, "item": message.model_dump()}
                ),
                self._event(f"response.{answer.status}", {"response": answer.model_dump()}),
            )
        )

    def failing(self, error: ApiError) -> bytes:
        """An error's event."""
        detail = error.body()["error"]
        return self._event("error", {name: detail[name] for name in ("code", "message", "param")})

    def _event(self, kind: str, data: dict[str, Any]) -> bytes:
        number, self._count = self._count, self._count + 1
        return event({"type": kind, "sequence_number": number, **data}, kind)
