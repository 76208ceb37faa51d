"""Names that other engines give to sampling options, and what they are called here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

_Params = TypeVar("_Params")
# What is called otherwise here.
_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "max_gen_len": "max_new_tokens",
    "max_length": "max_new_tokens, which does not count the prompt",
    "do_sample": "temperature: 0 is greedy, above 0 draws",
    "greedy": "temperature=0",
    "temp": "temperature",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "stop_words": "stop",
    "eos_token_id": "stop_token_ids",
    "repeat_penalty": "repetition_penalty",
    "bad_words_ids": "bad_words, or suppress_tokens of ids",
    "min_tokens": "min_new_tokens",
    "min_length": "min_new_tokens, which does not count the prompt",
    "logits_processors": "logits_processor",
    "response_format": "structured, a StructuredOutput",
    "structured_outputs": "structured, a StructuredOutput",
    "guided_decoding": "structured, a StructuredOutput",
    "guided_json": "structured=StructuredOutput(json_schema=...)",
    "guided_regex": "structured=StructuredOutput(regex=...)",
    "guided_choice": "structured=StructuredOutput(choice=...)",
    "guided_grammar": "structured=StructuredOutput(grammar=...)",
    "random_seed": "seed",
    "num_return_sequences": "n",
    "best_of": "n, which leaves the choice to you",
    "num_logprobs": "top_logprobs",
    "return_logprob": "logprobs",
    "stream": "Engine.stream",
    "streamer": "Engine.stream",
    "model": "target",
    "sampling_params": "sampling",
    "generation_config": "sampling",
}
# What there is not, or not as an option.
_ABSENT = {
    "there is no beam search": """
        num_beams use_beam_search beam_width length_penalty early_stopping
    """,
    "text is decoded as the tokenizer does it, with or without skip_special_tokens": """
        spaces_between_special_tokens detokenize
    """,
}
_REASONS = {name: reason for reason, names in _ABSENT.items() for name in names.split()}


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
    if name in _REASONS:
        return f"{name}: no sampling option; {_REASONS[name]}"
    close = get_close_matches(name.lower().replace("-", "_"), known, n=1)
    expected = _NAMES.get(name) or next(iter(close), None) or ", ".join(known)
    return f"{name}: no sampling option; expected {expected}"
