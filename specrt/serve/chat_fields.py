"""Requests and answers of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from specrt.serve.fields import ResponseFormat, SamplingFields
from specrt.serve.tools import NamedTool, Tool, ToolCall
from specrt.serve.usage import Speculation, Usage


class Message(BaseModel):
    """One turn; what else it has is the chat template's to read."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatRequest(SamplingFields):
    """What is said so far, and how the next turn is to be made."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = Field(default=None, description="Accepted, without effect.")
    metadata: dict[str, Any] | None = Field(default=None, description="Accepted, without effect.")
    store: Literal[False] | None = Field(default=None, description="Nothing is stored.")
    service_tier: str | None = Field(default=None, description="Accepted, without effect.")
    safety_identifier: str | None = Field(default=None, description="Accepted, without effect.")
    prompt_cache_key: str | None = Field(default=None, description="Accepted, without effect.")
    reasoning_effort: str | None = Field(default=None, description="Accepted, without effect.")
    verbosity: str | None = Field(default=None, description="Accepted, without effect.")
    modalities: list[Literal["text"]] | None = None

    def form_names(self) -> dict[str, str]:
        """As of any request; a call of a tool has its form of the tools."""
        names = super().form_names()
        if self.tools and self.tool_choice not in (None, "none", "auto"):
            return {**names, "json_schema": "tools"}
        if self.response_format is not None and self.response_format.json_schema is not None:
            return {**names, "json_schema": "response_format.json_schema.schema"}
        return names


class TokenOfLogprobs(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TokenOfLogprobs):
    """The same of a token that came, and of the likeliest at its place."""

    top_logprobs: list[TokenOfLogprobs]


class ChoiceLogprobs(BaseModel):
    """Of each token."""

    content: list[TokenLogprobs] | None
    refusal: None = None


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None = None


class ChatAnswer(BaseModel):
    """All answers to a request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    x_specrt: Speculation
