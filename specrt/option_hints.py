"""Names that other engines give to sampling options, and what they are called here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

_Params = TypeVar("_Params")
_ONE_OUTPUT = "a prompt has one output: give it several times, with a seed each"
_NO_BEAMS = "there is no beam search"
_NO_LEAST = "ignore_eos, or logit_bias of -inf for the end-of-sequence token"
# What others call it, and what to say here.
_ELSEWHERE = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "max_gen_len": "max_new_tokens",
    "max_length": "max_new_tokens, which does not count the prompt",
    "min_tokens": _NO_LEAST,
    "min_new_tokens": _NO_LEAST,
    "min_length": _NO_LEAST,
    "do_sample": "temperature: 0 is greedy, above 0 draws",
    "greedy": "temperature=0",
    "temp": "temperature",
    "n": _ONE_OUTPUT,
    "best_of": _ONE_OUTPUT,
    "num_return_sequences": _ONE_OUTPUT,
    "num_beams": _NO_BEAMS,
    "use_beam_search": _NO_BEAMS,
    "beam_width": _NO_BEAMS,
    "length_penalty": _NO_BEAMS,
    "early_stopping": _NO_BEAMS,
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "stop_words": "stop",
    "eos_token_id": "stop_token_ids",
    "repeat_penalty": "repetition_penalty",
    "bad_words": "suppress_tokens, or logit_bias of -inf",
    "bad_words_ids": "suppress_tokens, or logit_bias of -inf",
    "allowed_token_ids": "logit_bias of -inf for all others",
    "random_seed": "seed",
    "top_logprobs": "logprobs, of the tokens that were chosen",
    "prompt_logprobs": "logprobs, of output tokens",
    "stream": "Engine.stream",
    "model": "target",
    "sampling_params": "sampling",
    "generation_config": "sampling",
}


def with_option_hints(cls: type[_Params]) -> type[_Params]:
    """Let a dataclass refuse unknown fields with what they are called here."""
    init: Any = cls.__init__

    @wraps(init)
    def checked(self: _Params, *args: Any, **given: Any) -> None:
        names = [one.name for one in fields(cls)]  # type: ignore[arg-type]
        for name in given:
            if name not in names:
                raise TypeError(unknown_option(name, names))
        init(self, *args, **given)

    cls.__init__ = checked  # type: ignore[assignment, method-assign]
    return cls


def unknown_option(name: str, known: Iterable[str]) -> str:
    """What to tell a caller whose option is none of those known."""
    close = get_close_matches(name.lower().replace("-", "_"), known, n=1)
    hint = _ELSEWHERE.get(name) or next(iter(close), None)
    return f"{name}: no sampling option; expected {hint or ', '.join(known)}"
