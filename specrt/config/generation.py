"""How a model's authors would have its tokens chosen: ``generation_config.json``.

What is part of ``transformers``' greedy output applies to every request that leaves it unset. What
is about sampling is for those who ask for it. What specrt does not have is named, never passed over
in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specrt.config.values import flag, integer, number, token_ids

_MOST = 2**31 - 1
# What transformers acts upon and specrt does not have, and the values that change nothing there.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_decoder_ids": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "stop_strings": (),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
GENERATION_KEYS = frozenset(
    {
        *_UNSUPPORTED,
        *("do_sample", "temperature", "top_k", "top_p", "min_p"),
        *("max_new_tokens", "repetition_penalty", "suppress_tokens"),
        *("max_length", "early_stopping", "length_penalty", "num_return_sequences"),
        *("output_scores", "output_logits", "return_dict_in_generate"),
        *("remove_invalid_values", "renormalize_logits"),
    }
)
"""Keys of transformers' generation settings, which old checkpoints have in ``config.json``."""


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model's own settings say where a request says nothing."""

    repetition_penalty: float = 1.0
    suppress_tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    """0, greedy, unless the model says ``do_sample``."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int | None = None
    offered: tuple[str, ...] = ()
    """What is said about sampling and applies only where it is asked for, as ``key value``."""
    ignored: tuple[str, ...] = ()
    """What transformers would act upon and specrt does not have, as ``key value``."""

    def notice(self) -> str | None:
        """One line about what applies and what does not; None where nothing is said."""
        applied = [f"repetition_penalty {self.repetition_penalty:g}"]
        applied = applied if self.repetition_penalty != 1.0 else []
        if self.suppress_tokens:
            applied.append(f"suppress_tokens ({len(self.suppress_tokens)})")
        parts = [
            (applied, "by default"),
            (self.offered, "only if asked for (Engine.default_sampling, --model-defaults)"),
            (self.ignored, "not at all, though in transformers"),
        ]
        said = [f"{', '.join(what)}: {when}" for what, when in parts if what]
        return f"the model's own generation settings apply: {'; '.join(said)}" if said else None

    @property
    def is_complete(self) -> bool:
        """Whether all that is said applies by default."""
        return not (self.offered or self.ignored)


def read_generation(data: Mapping[str, Any], source: str, vocab_size: int) -> GenerationDefaults:
    """Read the content of a ``generation_config.json``, or a ``config.json`` with such keys.

    Args:
        data: the content.
        source: what errors call the file.
        vocab_size: V; suppressed tokens outside of it mean nothing.

    Raises:
        CheckpointError: a value has another type, or is out of the range of a request's.
    """
    # A null is as good as no key.
    given = {key: value for key, value in data.items() if value is not None}

    def read(key: str, default: float, least: float, most: float) -> float:
        return number(given.get(key, default), key, source, least, most)

    is_sampled = flag(given.get("do_sample", False), "do_sample", source)
    temperature = read("temperature", 1.0, 0.0, 1e5)
    suppressed = token_ids(given.get("suppress_tokens", []), "suppress_tokens", source)
    max_new_tokens = integer(given.get("max_new_tokens", 0), "max_new_tokens", source, 0, _MOST)
    return GenerationDefaults(
        repetition_penalty=read("repetition_penalty", 1.0, 1e-5, 99999.0),
        suppress_tokens=tuple(token for token in suppressed if 0 <= token < vocab_size),
        # What is too close to 0 for a division takes the largest logit too.
        temperature=temperature if is_sampled and temperature >= 1e-5 else 0.0,
        top_k=max(0, integer(given.get("top_k", 0), "top_k", source, -1, _MOST)),
        top_p=read("top_p", 1.0, 1e-30, 1.0),
        min_p=read("min_p", 0.0, 0.0, 1.0),
        max_new_tokens=max_new_tokens or None,
        offered=_offered(data),
        ignored=_ignored(data),
    )


def _offered(data: Mapping[str, Any]) -> tuple[str, ...]:
    # Written out whole, old configurations have these values, which transformers would take anyway.
    usual = {"temperature": (1,), "top_k": (0, 50), "top_p": (1,), "min_p": (0,)}
    said = ["do_sample"] if data.get("do_sample") else []
    for key, values in usual.items():
        if data.get(key) is not None and data[key] not in values:
            said.append(f"{key} {data[key]}")
    return tuple(said)


def _ignored(data: Mapping[str, Any]) -> tuple[str, ...]:
    said = []
    for key, neutral in _UNSUPPORTED.items():
        value = data.get(key)
        if value is not None and value not in neutral and value != [] and value != {}:
            said.append(f"{key} {value}")
    return tuple(text if len(text) <= 60 else f"{text[:57]}..." for text in said)
