"""Fields that requests of several routes share, and what they mean to the engine."""

from __future__ import annotations

import json
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from specrt.draft.base import DraftParams
from specrt.sampling import StructuredOutput

_ID = Annotated[int, Field(ge=0)]
Ids = Annotated[list[_ID], Field(max_length=4096, fail_fast=True)]
_Text = Annotated[str, Field(min_length=1, max_length=1000)]
_Texts = Annotated[list[_Text], Field(max_length=64)]
_MOST_BIASES = 1024
_MOST_FIELDS = 256


def _sayable(value: dict[str, Any]) -> dict[str, Any]:
    """Python reads NaN and Infinity, and none may be given back: that is no JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError("expected what JSON can say, without NaN and Infinity") from error
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_sayable)]
"""Whatever it holds, it can be given back."""


class Strict(BaseModel):
    """Fields of exactly their types; what is unknown is refused.

    A whole number may be written as clients do whose numbers are all floats: ``16.0``.
    """

    # Errors may be logged, and what was said is not.
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, data: Any) -> Any:
        """One error for very many fields, and not one for each; whole numbers as such."""
        if not isinstance(data, dict):
            return data
        if len(data) > _MOST_FIELDS:
            raise ValueError(f"expected at most {_MOST_FIELDS} fields, got {len(data)}")
        names = _whole_fields(cls)
        whole = {
            name: int(value)
            for name, value in data.items()
            if isinstance(value, float) and value.is_integer() and name in names
        }
        return {**data, **whole} if whole else data


@lru_cache
def _whole_fields(kind: type[BaseModel]) -> frozenset[str]:
    """Fields that take integers and no floats."""
    kinds = {name: _plain_kinds(field.annotation) for name, field in kind.model_fields.items()}
    return frozenset(name for name, found in kinds.items() if int in found and float not in found)


def _plain_kinds(annotation: Any) -> set[Any]:
    """The types of a field's values, those of lists left out."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain_kinds(arguments[0])
    if origin is Literal:
        return set(map(type, arguments))
    if origin in (Union, UnionType):
        return set().union(*map(_plain_kinds, arguments))
    return {annotation}


class StreamOptions(Strict):
    """What a stream has besides."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="Accepted, without effect.")


class Speculative(Strict):
    """How this request's tokens are drafted; its text does not depend on it."""

    enabled: bool | None = Field(default=None, description="False: plain decoding.")
    max_tokens: Annotated[int, Field(ge=0, le=63)] | None = Field(
        None, description="Drafted tokens of a round, from the root down."
    )

    def draft(self) -> DraftParams | None:
        """The same for the engine."""
        most = 0 if self.enabled is False else self.max_tokens
        return None if most is None else DraftParams(depth=most, total_tokens=most + 1)


class Wishes(Strict):
    """What answers tell of the engine's rounds."""

    trees: bool | None = Field(default=None, description="Stream each round's tree.")


class StructuredOutputs(Strict):
    """A form of text; exactly one of the fields."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def form(self) -> StructuredOutput:
        """The same for the engine.

        Raises:
            ValueError: it is none, or several.
        """
        return StructuredOutput(
            json_schema=self.json_, regex=self.regex, choice=self.choice, grammar=self.grammar
        )


class JsonSchemaFormat(Strict):
    """A named schema."""

    name: str | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="The schema is always kept to.")


class ResponseFormat(Strict):
    """OpenAI's form of structured output."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def form(self) -> StructuredOutput | None:
        """The same for the engine.

        Raises:
            ValueError: there should be a schema, or is none that can be.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutput(json_schema={"type": "object"})
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise ValueError("response_format.json_schema.schema: expected a schema, got none")
        return StructuredOutput(json_schema=self.json_schema.schema_)


class SamplingFields(Strict):
    """How tokens are chosen and when an answer ends: OpenAI's fields and those of vLLM."""

    model: str | None = Field(
        default=None, description="As /v1/models has it; the only one if left out."
    )
    temperature: float | None = Field(default=None, ge=0, le=1e5, description="0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    n: int | None = Field(default=None, ge=1, le=1024)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: _Text | _Texts | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, lt=1e5)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=_MOST_BIASES)
    min_tokens: int | None = Field(default=None, ge=0)
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: _Texts | None = None
    allowed_token_ids: list[_ID] | None = Field(default=None, max_length=1 << 18, fail_fast=True)
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculative: Speculative | None = None
    x_specrt: Wishes | None = None
    cache_salt: str | None = Field(default=None, max_length=256)
    user: str | None = Field(default=None, description="Accepted, without effect.")

    def form(self) -> StructuredOutput | None:
        """The form that the text is to have.

        Raises:
            ValueError: more than one is given, or it is none that can be.
        """
        guided = {
            "json_schema": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        given = {name: value for name, value in guided.items() if value is not None}
        if given and self.structured_outputs is not None:
            raise ValueError("structured_outputs: expected it alone, got guided_ fields besides")
        if given:
            return StructuredOutput(**given)  # type: ignore[arg-type]
        return None if self.structured_outputs is None else self.structured_outputs.form()

    def form_names(self) -> dict[str, str]:
        """By what the engine calls a form's field, what the request calls it."""
        is_guided = self.structured_outputs is None
        own = {kind: f"guided_{kind}" for kind in ("regex", "choice", "grammar")}
        if is_guided:
            return {**own, "json_schema": "guided_json"}
        given = {kind: f"structured_outputs.{kind}" for kind in own}
        return {**given, "json_schema": "structured_outputs.json"}
