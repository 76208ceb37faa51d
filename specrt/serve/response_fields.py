"""Requests and answers of ``/v1/responses``: text and calls of functions, without a store."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from specrt.serve.fields import JsonObject, JsonSchemaFormat, SamplingFields, Strict
from specrt.serve.tools import Function, FunctionName
from specrt.serve.usage import Speculation


class MessageItem(Strict):
    """One turn."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(Strict):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class CallOutputItem(Strict):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[dict[str, Any]]
    id: str | None = None
    status: str | None = None


_ITEMS = {"function_call": "Call", "function_call_output": "CallOutput", "message": "Message"}


def _tag(item: Any) -> str | None:
    given = item.get("type") if isinstance(item, dict) else None
    return "Message" if given is None else _ITEMS.get(given) if isinstance(given, str) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("Message")]
    | Annotated[CallItem, Tag("Call")]
    | Annotated[CallOutputItem, Tag("CallOutput")],
    Discriminator(
        _tag,
        custom_error_type="unknown_item",
        custom_error_message=f"expected an item of the type {', '.join(sorted(_ITEMS))}",
    ),
]


class _OfFunctions(Strict):
    """A last base, so that its field is the first one: another kind has other fields."""

    type: Literal["function"]


class FunctionTool(Function, _OfFunctions):
    """A function that the model may call; other tools there are none."""


class NamedFunction(FunctionName, _OfFunctions):
    """The function that is to be called."""


class TextFormat(JsonSchemaFormat):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]


class TextOptions(Strict):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: str | None = Field(default=None, description="Accepted, without effect.")


class ResponseRequest(SamplingFields):
    """What is said so far, and how the next turn is to be made."""

    # One turn fewer than a chat may have: the instructions are one.
    input: str | Annotated[list[InputItem], Field(max_length=4095)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    top_logprobs: Literal[0] | None = None
    text: TextOptions | None = None
    n: Literal[1] | None = None
    background: Literal[False] | None = None
    metadata: JsonObject | None = Field(default=None, description="Given back.")
    parallel_tool_calls: bool | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    reasoning: dict[str, Any] | None = Field(default=None, description="Accepted, without effect.")
    truncation: Literal["disabled"] | None = None
    store: bool | None = Field(default=None, description="Nothing is stored, whatever it says.")
    include: list[str] | None = Field(default=None, max_length=0)
    service_tier: str | None = Field(default=None, description="Accepted, without effect.")
    safety_identifier: str | None = Field(default=None, description="Accepted, without effect.")
    prompt_cache_key: str | None = Field(default=None, description="Accepted, without effect.")


class OutputText(BaseModel):
    """A part of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    """The model's turn."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed"] = "completed"


class InputTokensDetails(BaseModel):
    """Of ``input_tokens``."""

    cached_tokens: int


class OutputTokensDetails(BaseModel):
    """Of ``output_tokens``; there is no reasoning apart."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why it is not whole."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseAnswer(BaseModel):
    """A response, whole or on its way."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False
    temperature: float
    top_p: float
    text: dict[str, Any]
    tool_choice: Literal["none", "auto", "required"] | NamedFunction = "none"
    tools: list[FunctionTool] = []
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, Any]
    x_specrt: Speculation | None = None
