"""Sampling parameters of one request.

Names follow ``transformers``; ``presence_penalty`` and ``frequency_penalty`` are OpenAI's and
vLLM's: they count output tokens only, ``repetition_penalty`` counts the prompt as well.
"""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, TypedDict

import torch

from specrt.config import GenerationDefaults
from specrt.option_hints import with_option_hints
from specrt.sampling.structured import StructuredOutput, refusal

LogitsProcessor: TypeAlias = Callable[[list[int], torch.Tensor], torch.Tensor]
"""From a sequence's token ids so far (prompt, then output) and the target's logits behind them,
``[V]`` float32 on the host, both copies, to the logits to go on with, of that shape and dtype."""

MODEL_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_new_tokens",
    "repetition_penalty",
    "suppress_tokens",
)
"""The fields of :class:`SamplingParams` that a model may have values of its own for."""
MAX_CHOICES = 1024
"""Answers that one prompt may have."""
_FLOAT = struct.Struct("=f")


def _plain(value: Any) -> Any:
    """A number of numpy's or torch's as Python's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _with_int_keys(biases: Mapping[Any, Any]) -> dict[Any, Any]:
    """Biases by token id, where JSON had to write it as text; what is no id stays for checks."""
    found: dict[Any, Any] = {}
    for key, bias in biases.items():
        is_digits = isinstance(key, str) and key.isascii() and key.isdigit()
        token = int(key) if is_digits else _plain(key)
        if token in found:
            raise refusal("logit_bias", "each token id once", key)
        found[token] = _plain(bias)
    return found


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Whether the kernels' float32 holds it; what is not 0 must not become 0 there."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        (held,) = _FLOAT.unpack(_FLOAT.pack(float(value)))
    except OverflowError:
        return False
    return held != 0.0 or value == 0


@with_option_hints
@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends.

    Processing order: logits_processor, then what it cannot undo (allowed_token_ids,
    min_new_tokens, bad_words, structured), then transformers' order: logit_bias,
    repetition_penalty, presence and frequency penalties, temperature, top_k (ties kept), top_p over
    what top_k left, min_p.

    Raises:
        ValueError: a field is out of range; the message names it, what was expected and what came.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """Before so many output tokens no stop token comes, the end of the sequence's among them, and
    stop strings do not count."""
    temperature: float = 0.0
    """0 is greedy: the largest processed logit, the lowest id on ties."""
    top_k: int | None = 0
    """Keep the k largest logits; 0, -1 or None is off (and is kept as 0)."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens that holds this mass; equal logits by id."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest token's probability."""
    repetition_penalty: float | None = None
    """Divides positive and multiplies negative logits of tokens in the prompt or the output; None
    is the model's own, from its ``generation_config.json``, else 1 (off)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the output (the prompt does not count)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it is in the output."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids; ``-inf`` bans a token. Ids may be written as JSON
    writes them, ``"50256"``."""
    suppress_tokens: Sequence[int] | None = None
    """Token ids that never come; None is the model's own, ``()`` is none."""
    bad_words: Sequence[str] | None = None
    """Texts that the output does not come to have, each as the tokenizer spells it with and without
    a space before it; of other spellings nothing is known."""
    allowed_token_ids: Sequence[int] | None = None
    """Token ids besides which none comes, stop tokens included."""
    logits_processor: LogitsProcessor | None = None
    """Edits the target's raw logits. It must depend on its arguments alone: it is asked once or
    more for a position, and for drafted tokens that do not come to be. What it raises, or returns
    that is no logits, ends its request with an error."""
    structured: StructuredOutput | None = None
    """What the output's text conforms to, whole: a stop token comes where it may end, and nothing
    else where it cannot go on. (``max_new_tokens`` may cut it off.) A mapping of its one field is
    taken as one."""
    seed: int | None = None
    """64 bits (negative values wrap); None: the engine draws one (``with_seed``)."""
    stop: str | Sequence[str] | None = None
    """Texts that end the output. The one that is complete first decides, of those that end together
    the longest. A special token's text is one too ("<|im_end|>", "b<|im_end|>")."""
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    """Whether the text keeps the stop string, or the stop token's own text, that ended it."""
    ignore_eos: bool = False
    logprobs: bool = False
    """Report each token's log-probability under the target's unprocessed law."""
    top_logprobs: int = 0
    """Report so many of the likeliest tokens at each output token's place, of equal ones the lowest
    id first, and with them ``logprobs``."""
    prompt_logprobs: int | None = None
    """Report each prompt token's log-probability, and so many of the likeliest at its place."""
    skip_special_tokens: bool = True
    """Whether the text leaves special tokens out; False writes them as the tokenizer does."""
    report_trees: bool = False
    """Report each round's tree, and which path of it was accepted (``StreamChunk.tree``)."""
    n: int = 1
    """Answers to the prompt. Answer i is that of the seed + i, mod 2**64."""
    cache_salt: str = ""
    """Beginnings of texts are shared among requests with the same one only; moves times alone."""

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, _plain(getattr(self, one.name)))
        if self.top_k is None or self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", _with_int_keys(self.logit_bias))
        form: object = self.structured
        if isinstance(form, Mapping):
            object.__setattr__(self, "structured", StructuredOutput.of(form))
        self._check_ranges()
        self._check_filters()
        self._check_bias()
        self._check_stops()
        self._check_edits()
        self._check_reports()

    def _check_ranges(self) -> None:
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise refusal("max_new_tokens", "an int >= 1", self.max_new_tokens)
        least = self.min_new_tokens
        if not _is_int(least) or not 0 <= least <= self.max_new_tokens:
            expected = f"an int in 0..max_new_tokens ({self.max_new_tokens})"
            raise refusal("min_new_tokens", expected, least)
        # Logits divided by less could overflow float32.
        if not _is_number(self.temperature) or not (
            self.temperature == 0.0 or 1e-5 <= self.temperature < math.inf
        ):
            expected = "0 (greedy) or a number >= 1e-5 that float32 holds"
            raise refusal("temperature", expected, self.temperature)
        penalty = self.repetition_penalty
        if penalty is not None and (not _is_number(penalty) or not 1e-5 <= penalty < 1e5):
            raise refusal("repetition_penalty", "None or a number in [1e-5, 1e5)", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or not abs(value) < 1e5:
                raise refusal(name, "a number within 1e5 that float32 holds", value)
        if self.seed is not None and not (_is_int(self.seed) and -(2**63) <= self.seed < 2**64):
            raise refusal("seed", "None or an int of 64 bits", self.seed)

    def _check_filters(self) -> None:
        if self.top_k is not None and not (_is_int(self.top_k) and 0 <= self.top_k < 2**31):
            raise refusal("top_k", "None, -1 or an int >= 0", self.top_k)
        if not _is_number(self.top_p) or not 1e-30 <= self.top_p <= 1.0:
            raise refusal("top_p", "a number in (0, 1]", self.top_p)
        if not _is_number(self.min_p) or not 0.0 <= self.min_p <= 1.0:
            raise refusal("min_p", "a number in [0, 1] that float32 holds", self.min_p)

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise refusal("logit_bias", "None or a mapping of token id to bias", self.logit_bias)
        for token, bias in self.logit_bias.items():
            if not _is_int(token) or token < 0:
                raise refusal("logit_bias", "token ids >= 0", token)
            if not _is_number(bias) or math.isnan(bias) or bias > 1e30:
                raise refusal(
                    f"logit_bias[{token}]", "-inf or a number <= 1e30 that float32 holds", bias
                )

    def _check_stops(self) -> None:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if stops is not None and (
            not isinstance(stops, Sequence) or any(not isinstance(s, str) or not s for s in stops)
        ):
            raise refusal("stop", "None, a non-empty str or a sequence of them", self.stop)
        for name in ("stop_token_ids", "suppress_tokens", "allowed_token_ids"):
            ids: object = getattr(self, name)
            if ids is not None and (
                isinstance(ids, str)
                or not isinstance(ids, Sequence)
                or any(not _is_int(token) or token < 0 for token in ids)
            ):
                raise refusal(name, "None or a sequence of ints >= 0", ids)
        if not isinstance(self.cache_salt, str):
            raise refusal("cache_salt", "a str", self.cache_salt)

    def _check_edits(self) -> None:
        words: object = self.bad_words
        if words is not None and (
            isinstance(words, str)
            or not isinstance(words, Sequence)
            or any(not isinstance(word, str) or not word.strip() for word in words)
        ):
            raise refusal("bad_words", "None or a sequence of texts that are no space", words)
        if self.allowed_token_ids is not None and not len(self.allowed_token_ids):
            raise refusal("allowed_token_ids", "None or at least one id", self.allowed_token_ids)
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise refusal("logits_processor", "None or a callable", self.logits_processor)
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise refusal("structured", "None or a StructuredOutput", self.structured)

    def _check_reports(self) -> None:
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "logprobs",
            "skip_special_tokens",
            "report_trees",
        ):
            if not isinstance(getattr(self, name), bool):
                raise refusal(name, "a bool", getattr(self, name))
        if not _is_int(self.top_logprobs) or self.top_logprobs < 0:
            raise refusal("top_logprobs", "an int >= 0", self.top_logprobs)
        count = self.prompt_logprobs
        if count is not None and (not _is_int(count) or count < 0):
            raise refusal("prompt_logprobs", "None or an int >= 0", count)
        if not _is_int(self.n) or not 1 <= self.n <= MAX_CHOICES:
            raise refusal("n", f"an int in [1, {MAX_CHOICES}]", self.n)

    @property
    def wants_logprobs(self) -> bool:
        """Whether output tokens' log-probabilities are reported."""
        return self.logprobs or self.top_logprobs > 0

    @property
    def is_greedy(self) -> bool:
        """Whether the temperature is 0."""
        return self.temperature == 0.0

    @property
    def edits_logits(self) -> bool:
        """Whether a bias or a penalty applies, if the model has none of its own."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        is_biased = bool(self.logit_bias) or bool(self.suppress_tokens)
        return is_biased or penalties not in ((1.0, 0.0, 0.0), (None, 0.0, 0.0))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple, empty if there is none."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @classmethod
    def from_defaults(cls, defaults: GenerationDefaults) -> SamplingParams:
        """What a model's authors would have its tokens chosen by."""
        chosen = {name: getattr(defaults, name) for name in MODEL_FIELDS}
        return cls(**{name: value for name, value in chosen.items() if value is not None})

    def with_defaults(self, defaults: GenerationDefaults | None = None) -> SamplingParams:
        """These parameters with nothing left to the model, suppressed tokens among the biases.

        Args:
            defaults: what applies where these say nothing; None: nothing does.
        """
        if self.repetition_penalty is not None and self.suppress_tokens == ():
            return self
        own = defaults or GenerationDefaults()
        penalty, banned = self.repetition_penalty, self.suppress_tokens
        banned = own.suppress_tokens if banned is None else banned
        return replace(
            self,
            repetition_penalty=own.repetition_penalty if penalty is None else penalty,
            suppress_tokens=(),
            logit_bias={**(self.logit_bias or {}), **dict.fromkeys(banned, -math.inf)} or None,
        )

    def with_seed(self, seed: int | None = None) -> SamplingParams:
        """These parameters with a seed: their own, else the one given, else a fresh random one."""
        if self.seed is not None:
            return self
        # No more bits than a double holds: JSON of JavaScript and jq would give back another seed.
        return replace(self, seed=secrets.randbits(53) if seed is None else seed)

    def choices(self) -> list[SamplingParams]:
        """Of each of the ``n`` answers by itself, with seeds if there are several."""
        if self.n == 1:
            return [self]
        first = replace(self.with_seed(), n=1)
        assert first.seed is not None, "it has one now"
        seeds = ((first.seed + choice) % 2**64 for choice in range(1, self.n))
        return [first, *(replace(first, seed=seed) for seed in seeds)]


class SamplingOptions(TypedDict, total=False):
    """The fields of :class:`SamplingParams` as keyword arguments of a call."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    suppress_tokens: Sequence[int] | None
    bad_words: Sequence[str] | None
    allowed_token_ids: Sequence[int] | None
    logits_processor: LogitsProcessor | None
    structured: StructuredOutput | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: int | None
    skip_special_tokens: bool
    report_trees: bool
    n: int
    cache_salt: str


def one_each(
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    count: int,
    options: Mapping[str, Any] | None = None,
) -> list[SamplingParams]:
    """Parameters of each of ``count`` prompts, with ``options`` in place of their own fields.

    Args:
        sampling: for all, or one each; None is the default.

    Raises:
        ValueError: there are not so many, one is none, or an option is out of range.
        TypeError: an option is no field.
    """
    if sampling is None or isinstance(sampling, SamplingParams):
        params = [sampling or SamplingParams()] * count
    elif isinstance(sampling, Sequence):
        params = list(sampling)
    else:
        raise refusal("sampling", "SamplingParams, or one for each prompt", sampling)
    if len(params) != count:
        raise ValueError(f"sampling: expected one for each of {count} prompts, got {len(params)}")
    for index, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise refusal(f"sampling[{index}]", "SamplingParams", one)
    return [replace(one, **options) for one in params] if options else params
