"""Sampling parameters on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specrt.cli.options import SAMPLING

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.sampling import SamplingParams


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=SAMPLING)


MaxNewTokens = Annotated[int, _option(help="At most so many.")]
Temperature = Annotated[float, _option(help="0 is greedy.")]
Seed = Annotated[int | None, _option(help="Same seed, same text.")]


@dataclass(frozen=True)
class BriefSampling:
    """Of commands that measure: what changes how fast a drafter is."""

    max_new_tokens: MaxNewTokens = 128
    temperature: Temperature = 0.0
    seed: Seed = 0

    def params(self) -> SamplingParams:
        """The same, checked.

        Raises:
            ValueError: an option is out of range.
        """
        from specrt.sampling import SamplingParams

        return SamplingParams(**vars(self))


@dataclass(frozen=True)
class DemoSampling(BriefSampling):
    """Of the demo, whose answers are to be seen whole."""

    max_new_tokens: MaxNewTokens = 160


@dataclass(frozen=True)
class SamplingOptions:
    """All of them, by the names of :class:`specrt.sampling.SamplingParams`."""

    max_new_tokens: MaxNewTokens = 256
    min_new_tokens: Annotated[int, _option(help="Before so many, nothing ends the output.")] = 0
    temperature: Temperature = 0.0
    top_k: Annotated[int, _option(help="0 or -1: off.")] = 0
    top_p: Annotated[float, _option(help="1: off.")] = 1.0
    min_p: Annotated[float, _option(help="0: off.")] = 0.0
    repetition_penalty: Annotated[
        float | None, _option(help="1: off; default: the model's own.")
    ] = None
    presence_penalty: Annotated[float, _option(help="0: off.")] = 0.0
    frequency_penalty: Annotated[float, _option(help="0: off.")] = 0.0
    logit_bias: Annotated[
        list[str] | None, _option(metavar="ID=VALUE,...", help="Added to logits; repeatable.")
    ] = None
    suppress_tokens: Annotated[
        list[int] | None,
        _option(help="Token that never comes; repeatable; default: the model's own."),
    ] = None
    bad_words: Annotated[list[str] | None, _option(help="Text that does not come; repeatable.")] = (
        None
    )
    allowed_token_ids: Annotated[
        list[str] | None,
        _option(metavar="ID,...", help="Tokens besides which none comes; repeatable."),
    ] = None
    structured: Annotated[
        str | None,
        _option(
            metavar="JSON",
            help='What the text conforms to: {"json_schema": {...}}, {"regex": "..."}, '
            '{"choice": [...]} or {"grammar": "..."}.',
        ),
    ] = None
    model_defaults: Annotated[
        bool,
        _option(
            "--model-defaults",
            help="Take what is not given here from the model's generation_config.json.",
        ),
    ] = False
    seed: Seed = None
    stop: Annotated[list[str] | None, _option(help="Text that ends the output; repeatable.")] = None
    stop_token_ids: Annotated[
        list[str] | None,
        _option(metavar="ID,...", help="Tokens that end the output; repeatable."),
    ] = None
    include_stop_str_in_output: Annotated[
        bool,
        _option("--include-stop-str-in-output", help="Keep what ended the output in its text."),
    ] = False
    ignore_eos: Annotated[bool, _option("--ignore-eos", help="Go on past its end.")] = False
    logprobs: Annotated[bool, _option("--logprobs", help="Add them to the JSON.")] = False
    top_logprobs: Annotated[
        int, _option(help="Add so many of each place's likeliest tokens to the JSON.")
    ] = 0
    prompt_logprobs: Annotated[
        int | None, _option(help="Add the prompt's to the JSON, and so many of the likeliest.")
    ] = None
    skip_special_tokens: Annotated[
        bool,
        _option(
            "--skip-special-tokens/--no-skip-special-tokens",
            help="Whether text leaves special tokens out.",
        ),
    ] = True
    n: Annotated[int, _option(help="Answers to each prompt; seeds count up.")] = 1
    cache_salt: Annotated[
        str, _option(help="Share beginnings with prompts of the same one only.")
    ] = ""

    def check_shown(self, *, is_json: bool, where: str) -> None:
        """Whether what is asked for is shown.

        Args:
            is_json: whether results are printed as JSON.
            where: what would show it.

        Raises:
            ValueError: an option asks for what only JSON shows; names it.
        """
        for name, off in (("logprobs", False), ("top_logprobs", 0), ("prompt_logprobs", None)):
            if not is_json and getattr(self, name) != off:
                raise ValueError(f"{name}: goes with {where}, which shows them")

    def params(self) -> SamplingParams:
        """The same, checked, the model's own left open.

        Raises:
            ValueError: an option is out of range, or not of its form.
        """
        from specrt.sampling import SamplingParams

        given = {name: value for name, value in vars(self).items() if name != "model_defaults"}
        given |= {
            "logit_bias": _parse_logit_bias(self.logit_bias or ()) or None,
            "suppress_tokens": tuple(self.suppress_tokens) if self.suppress_tokens else None,
            "stop": tuple(self.stop or ()),
            "stop_token_ids": _parse_token_ids("stop_token_ids", self.stop_token_ids),
            "bad_words": tuple(self.bad_words) if self.bad_words else None,
            "allowed_token_ids": _parse_token_ids("allowed_token_ids", self.allowed_token_ids)
            or None,
            "structured": _parse_structured(self.structured),
        }
        return SamplingParams(**given)


@dataclass(frozen=True)
class ChatSampling(SamplingOptions):
    """Of a chat, whose answers may be long."""

    max_new_tokens: MaxNewTokens = 512


def left_to_the_model(context: typer.Context, engine: Engine) -> dict[str, Any]:
    """The model's own values of the sampling options that the command line does not give."""
    from specrt.sampling import MODEL_FIELDS

    given = [name for name in MODEL_FIELDS if not _is_default(context, name)]
    model = engine.default_sampling
    return {name: getattr(model, name) for name in MODEL_FIELDS if name not in given}


def _is_default(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is None or source.name == "DEFAULT"


def _parse_logit_bias(items: Sequence[str]) -> dict[int, float]:
    """``ID=VALUE`` items, several to one with commas between them, as a mapping."""
    biases = {}
    for item in _split(items):
        token, _, value = item.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise ValueError(f"logit_bias: expected ID=VALUE, got {item!r}") from None
    return biases


def _parse_token_ids(name: str, items: Sequence[str] | None) -> tuple[int, ...]:
    """Ids, several to one item with commas between them."""
    given = items or ()
    try:
        return tuple(int(item) for item in _split(given))
    except ValueError:
        raise ValueError(f"{name}: expected token ids, got {' '.join(given)!r}") from None


def _parse_structured(text: str | None) -> object:
    """A form of output as JSON has it, unchecked."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"structured: expected JSON ({error}), got {text!r}") from None


def _split(items: Sequence[str]) -> list[str]:
    return [part for item in items for part in item.split(",")]
