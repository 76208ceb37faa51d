"""From a request's fields to the engine's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specrt.config import GenerationDefaults
from specrt.sampling import SamplingParams, StructuredOutput
from specrt.serve.fields import SamplingFields

_SAME = (
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "bad_words",
    "allowed_token_ids",
)
_MODEL_FIELDS = ("temperature", "top_k", "top_p", "min_p")


def sampling_params(
    fields: SamplingFields,
    defaults: GenerationDefaults,
    max_tokens: int,
    form: StructuredOutput | None,
    cache_salt: str,
    more: Mapping[str, Any] | None = None,
) -> SamplingParams:
    """How a request's tokens are chosen.

    What it leaves open is the model's own (``generation_config.json``), where that samples; else
    temperature 1, as OpenAI's clients expect.

    Args:
        fields: of the request.
        defaults: the model's own.
        max_tokens: of each answer.
        form: what the text is to conform to.
        cache_salt: prefixes are shared among equal ones only.
        more: what the route has besides.

    Raises:
        ValueError: a field is out of range; names it.
    """
    given: dict[str, Any] = {"temperature": 1.0}
    if defaults.temperature:
        given = {name: getattr(defaults, name) for name in _MODEL_FIELDS}
    values = {name: getattr(fields, name) for name in ("temperature", *_SAME)}
    given |= {name: value for name, value in values.items() if value is not None}
    if fields.x_specrt is not None and fields.x_specrt.trees:
        given["report_trees"] = True
    return SamplingParams(
        max_new_tokens=max_tokens,
        min_new_tokens=fields.min_tokens or 0,
        structured=form,
        cache_salt=cache_salt,
        **given,
        **(more or {}),
    )
