"""``/v1/responses``: OpenAI's newer form of a conversation's next turn: text and calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from specrt.engine.results import GenerationResult, StreamChunk
from specrt.serve.answering import Answering
from specrt.serve.chat import calls_in, reader_of, start_chat, wanted_calls
from specrt.serve.chat_fields import ChatRequest, Message
from specrt.serve.errors import ApiError, JsonResponse
from specrt.serve.fields import JsonSchemaFormat, ResponseFormat, SamplingFields
from specrt.serve.response_fields import (
    CallItem,
    CallOutputItem,
    FunctionTool,
    IncompleteDetails,
    InputTokensDetails,
    MessageItem,
    NamedFunction,
    OutputCall,
    OutputMessage,
    OutputText,
    ResponseAnswer,
    ResponseRequest,
    ResponseUsage,
)
from specrt.serve.service import Service, new_id
from specrt.serve.streaming import EventStream, event
from specrt.serve.tools import Function, FunctionCall, FunctionName, NamedTool, Tool, ToolCall
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
        chat = as_chat(body)
        try:
            answering = await start_chat(service, chat, request)
        except ApiError as error:
            raise error.renamed({**_turns_of(body)[1], **_NAMES}) from error
        made = ResponseMaker(service, body, chat, answering)
        if body.stream:
            options = service.options
            return EventStream(
                answering, ResponseWriter(made), options.ping_seconds, options.request_seconds
            )
        results = await answering.whole(request.receive)
        text, calls = calls_in(chat, results[0].text)
        return JsonResponse(made.answer(results[0], made.items(results[0], text, calls)))

    return routes


_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}


def as_chat(body: ResponseRequest) -> ChatRequest:
    """The same as a request of the older form.

    Raises:
        ApiError: nothing is said.
    """
    if not body.input:
        raise ApiError(400, "input: expected a text or turns, got none", "input")
    shared = {name: getattr(body, name) for name in SamplingFields.model_fields}
    tools = [Tool(type="function", function=_function(tool)) for tool in body.tools or ()]
    return ChatRequest(
        **{name: value for name, value in shared.items() if value is not None},
        messages=_turns_of(body)[0],
        max_tokens=body.max_output_tokens,
        response_format=_format(body),
        tools=tools or None,
        tool_choice=_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
    )


def _turns_of(body: ResponseRequest) -> tuple[list[Message], dict[str, str]]:
    """All that is said, and by what the older form calls each part what the request does."""
    turns: list[Message] = []
    names: dict[str, str] = {}
    if body.instructions is not None:
        turns.append(Message(role="system", content=body.instructions))
        names["messages[0]"] = "instructions"
    if isinstance(body.input, str):
        names[f"messages[{len(turns)}]"] = "input"
        turns.append(Message(role="user", content=body.input))
        return turns, names
    for place, item in enumerate(body.input):
        _add_item(turns, item)
        turn = f"messages[{len(turns) - 1}]"
        if isinstance(item, CallOutputItem):
            names[f"{turn}.content"] = f"input[{place}].output"
        names.setdefault(turn, f"input[{place}]")
    return turns, names


def _choice(body: ResponseRequest) -> Literal["none", "auto", "required"] | NamedTool | None:
    choice = body.tool_choice
    if not isinstance(choice, NamedFunction):
        return choice
    return NamedTool(type="function", function=FunctionName(name=choice.name))


def _function(tool: FunctionTool) -> Function:
    return Function(**tool.model_dump(exclude={"type"}))


def _add_item(turns: list[Message], item: MessageItem | CallItem | CallOutputItem) -> None:
    """Add what an item says: a turn, or a call to the turn of the model's that it is of."""
    if isinstance(item, MessageItem):
        turns.append(Message(role=item.role, content=item.content))
    elif isinstance(item, CallOutputItem):
        turns.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
    else:
        if not turns or turns[-1].role != "assistant":
            turns.append(Message(role="assistant", content=None))
        function = FunctionCall(name=item.name, arguments=item.arguments)
        call = ToolCall(id=item.call_id, function=function).model_dump()
        turns[-1].tool_calls = [*(turns[-1].tool_calls or ()), call]


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
    chat: ChatRequest
    """The same as a request of the older form."""
    answering: Answering

    def __post_init__(self) -> None:
        self.id = new_id("resp", self.answering.request)
        self.message_id = new_id("msg", self.answering.request)
        self._created = int(time.time())

    def items(
        self, result: GenerationResult, text: str | None, calls: Sequence[ToolCall]
    ) -> list[OutputMessage | OutputCall]:
        """What an answer is: a message, if it says anything, and calls."""
        status = _status(result)
        items: list[OutputMessage | OutputCall] = []
        if text is not None:
            content = [OutputText(text=text)]
            items.append(OutputMessage(id=self.message_id, status=status, content=content))
        return [*items, *map(_output_call, calls)]

    def answer(
        self,
        result: GenerationResult | None,
        items: Sequence[OutputMessage | OutputCall] = (),
    ) -> dict[str, Any]:
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
            output=list(items),
            parallel_tool_calls=bool(body.tools) and body.parallel_tool_calls is not False,
            temperature=params.temperature,
            top_p=params.top_p,
            text=text,
            tool_choice=(body.tool_choice or "auto") if body.tools else "none",
            tools=body.tools or [],
            metadata=body.metadata or {},
        )
        if result is not None:
            made.status = _status(result)
            made.incomplete_details = None if made.status == "completed" else IncompleteDetails()
            made.usage = self._usage([result])
            made.x_specrt = speculation_of([result])
        return made.model_dump()

    def _usage(self, results: Sequence[GenerationResult]) -> ResponseUsage:
        usage = usage_of(self.answering.stream.prompt_ids, results)
        cached = usage.prompt_tokens_details.cached_tokens
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=cached),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )


def _status(result: GenerationResult) -> Literal["completed", "incomplete"]:
    return "completed" if finish_reason(result) == "stop" else "incomplete"


def _output_call(call: ToolCall) -> OutputCall:
    own = f"fc_{call.id.removeprefix('call_')}"
    function = call.function
    return OutputCall(id=own, call_id=call.id, name=function.name, arguments=function.arguments)


class ResponseWriter:
    """The events of a streamed response.

    Args:
        maker: of its objects.
    """

    def __init__(self, maker: ResponseMaker) -> None:
        self._maker = maker
        self._reader = reader_of(maker.chat)
        self._count = 0
        self._place = {"item_id": maker.message_id, "output_index": 0, "content_index": 0}
        self._told = ""
        self._blank = ""  # held back: before a call it is none of a message
        self._has_message = False

    def opening(self) -> bytes:
        """That it began."""
        begun = {"response": self._maker.answer(None)}
        return self._event("response.created", begun) + self._event("response.in_progress", begun)

    def chunk(self, chunk: StreamChunk) -> bytes:
        """New text."""
        text = chunk.text if self._reader is None else self._reader.feed(chunk.text)
        text, self._blank = self._blank + text, ""
        if not self._has_message and not text.strip():
            self._blank = text
            return b""
        return self._say(text)

    def closing(self) -> bytes:
        """The calls, and the whole."""
        maker = self._maker
        (result,) = maker.answering.in_order()
        rest, calls = ("", []) if self._reader is None else self._reader.end()
        calls, text = wanted_calls(maker.chat, calls), self._blank + rest
        data = b""
        if text.strip() or self._has_message or not calls:
            data = self._say(text)
        items = maker.items(result, self._told if self._has_message else None, calls)
        for place, item in enumerate(items):
            if isinstance(item, OutputMessage):
                data += self._end_message(place, item)
            else:
                data += self._call(place, item)
        answer = maker.answer(result, items)
        return data + self._event(f"response.{answer['status']}", {"response": answer})

    def failing(self, error: ApiError) -> bytes:
        """An error's event."""
        detail = error.body()["error"]
        return self._event("error", {name: detail[name] for name in ("code", "message", "param")})

    def _say(self, text: str) -> bytes:
        """Text of the message, which begins with it."""
        data = b""
        if not self._has_message:
            self._has_message = True
            item = OutputMessage(id=self._maker.message_id, status="in_progress", content=[])
            part = OutputText(text="").model_dump()
            data = self._item("added", 0, item)
            data += self._event("response.content_part.added", {**self._place, "part": part})
        if not text:
            return data
        self._told += text
        said = {**self._place, "delta": text, "logprobs": []}
        return data + self._event("response.output_text.delta", said)

    def _end_message(self, place: int, item: OutputMessage) -> bytes:
        part = item.content[0]
        done = {**self._place, "text": part.text, "logprobs": []}
        data = self._event("response.output_text.done", done)
        ended = {**self._place, "part": part.model_dump()}
        data += self._event("response.content_part.done", ended)
        return data + self._item("done", place, item)

    def _call(self, place: int, item: OutputCall) -> bytes:
        begun = item.model_copy(update={"arguments": "", "status": "in_progress"})
        where = {"item_id": item.id, "output_index": place}
        kind = "response.function_call_arguments"
        return b"".join(
            (
                self._item("added", place, begun),
                self._event(f"{kind}.delta", {**where, "delta": item.arguments}),
                self._event(
                    f"{kind}.done", {**where, "name": item.name, "arguments": item.arguments}
                ),
                self._item("done", place, item),
            )
        )

    def _item(self, what: str, place: int, item: OutputMessage | OutputCall) -> bytes:
        data = {"output_index": place, "item": item.model_dump()}
        return self._event(f"response.output_item.{what}", data)

    def _event(self, kind: str, data: dict[str, Any]) -> bytes:
        number, self._count = self._count, self._count + 1
        return event({"type": kind, "sequence_number": number, **data}, kind)
