"""Requests and answers of ``/v1/completions``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from specrt.sampling import StructuredOutput
from specrt.serve.fields import ResponseFormat, SamplingFields
from specrt.serve.usage import Speculation, Usage

# One error is enough: of a million ids each would be one, made while everybody waits.
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class CompletionRequest(SamplingFields):
    """Prompts, and how they are to go on."""

    prompt: (
        str
        | _Ids
        | Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)]
        | Annotated[list[_Ids], Field(min_length=1, max_length=1024, fail_fast=True)]
    )
    max_tokens: int | None = Field(default=None, ge=0, description="Default: 16; 0 goes with echo.")
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1, description="Only as n is.")
    response_format: ResponseFormat | None = None
    add_special_tokens: bool | None = Field(
        None, description="Whether texts get what the tokenizer adds (bos); true if left out."
    )

    def whole_form(self) -> StructuredOutput | None:
        """The form that the text is to have.

        Raises:
            ValueError: more than one is given, or it is none that can be.
        """
        given = self.form()
        if self.response_format is None or self.response_format.type == "text":
            return given
        if given is not None:
            raise ValueError("response_format: expected it alone, got structured_outputs besides")
        return self.response_format.form()

    def form_names(self) -> dict[str, str]:
        """As of any request, and of ``response_format``."""
        names = super().form_names()
        if self.response_format is not None and self.response_format.json_schema is not None:
            return {**names, "json_schema": "response_format.json_schema.schema"}
        return names


class CompletionLogprobs(BaseModel):
    """Of each token; ``top_logprobs`` by text, the token itself among them."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None


class CompletionAnswer(BaseModel):
    """All answers to a request: prompt by prompt, ``n`` each."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str | None = None
    x_specrt: Speculation
