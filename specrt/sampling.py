"""Sampling parameters of one request, and the rows of them that kernels read.

Names follow ``transformers``; ``presence_penalty`` and ``frequency_penalty`` are OpenAI's and
vLLM's: they count output tokens only, ``repetition_penalty`` counts the prompt as well.
"""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import torch

from specrt.config import GenerationDefaults
from specrt.ops.tree_accept import workspace_size
from specrt.option_hints import with_option_hints

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
# csrc/core/sampling_row.h, SamplingRow.
_ROW = struct.Struct("=d5f3iQ2q")
_ROW_WORDS = _ROW.size // 8
_BIAS_BOUNDS = _ROW_WORDS - 2  # the word of bias_begin; bias_end follows
_FLOAT = struct.Struct("=f")


def _fail(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got!r}")


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
            raise _fail("logit_bias", "each token id once", key)
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

    Processing order (transformers'): logit_bias, repetition_penalty, presence and frequency
    penalties, temperature, top_k (ties kept), top_p over what top_k left, min_p.

    Raises:
        ValueError: a field is out of range; the message names it, what was expected and what came.
    """

    max_new_tokens: int = 256
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

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, _plain(getattr(self, one.name)))
        if self.top_k is None or self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", _with_int_keys(self.logit_bias))
        self._check_ranges()
        self._check_filters()
        self._check_bias()
        self._check_stops()

    def _check_ranges(self) -> None:
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise _fail("max_new_tokens", "an int >= 1", self.max_new_tokens)
        # Logits divided by less could overflow float32.
        if not _is_number(self.temperature) or not (
            self.temperature == 0.0 or 1e-5 <= self.temperature < math.inf
        ):
            expected = "0 (greedy) or a number >= 1e-5 that float32 holds"
            raise _fail("temperature", expected, self.temperature)
        penalty = self.repetition_penalty
        if penalty is not None and (not _is_number(penalty) or not 1e-5 <= penalty < 1e5):
            raise _fail("repetition_penalty", "None or a number in [1e-5, 1e5)", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or not abs(value) < 1e5:
                raise _fail(name, "a number within 1e5 that float32 holds", value)
        if self.seed is not None and not (_is_int(self.seed) and -(2**63) <= self.seed < 2**64):
            raise _fail("seed", "None or an int of 64 bits", self.seed)

    def _check_filters(self) -> None:
        if self.top_k is not None and not (_is_int(self.top_k) and 0 <= self.top_k < 2**31):
            raise _fail("top_k", "None, -1 or an int >= 0", self.top_k)
        if not _is_number(self.top_p) or not 1e-30 <= self.top_p <= 1.0:
            raise _fail("top_p", "a number in (0, 1]", self.top_p)
        if not _is_number(self.min_p) or not 0.0 <= self.min_p <= 1.0:
            raise _fail("min_p", "a number in [0, 1] that float32 holds", self.min_p)

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise _fail("logit_bias", "None or a mapping of token id to bias", self.logit_bias)
        for token, bias in self.logit_bias.items():
            if not _is_int(token) or token < 0:
                raise _fail("logit_bias", "token ids >= 0", token)
            if not _is_number(bias) or math.isnan(bias) or bias > 1e30:
                raise _fail(
                    f"logit_bias[{token}]", "-inf or a number <= 1e30 that float32 holds", bias
                )

    def _check_stops(self) -> None:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if stops is not None and (
            not isinstance(stops, Sequence) or any(not isinstance(s, str) or not s for s in stops)
        ):
            raise _fail("stop", "None, a non-empty str or a sequence of them", self.stop)
        for name in ("stop_token_ids", "suppress_tokens"):
            ids: object = getattr(self, name)
            if ids is not None and (
                isinstance(ids, str)
                or not isinstance(ids, Sequence)
                or any(not _is_int(token) or token < 0 for token in ids)
            ):
                raise _fail(name, "None or a sequence of ints >= 0", ids)
        for name in ("include_stop_str_in_output", "ignore_eos", "logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise _fail(name, "a bool", getattr(self, name))

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
        return replace(self, seed=secrets.randbits(63) if seed is None else seed)


class SamplingOptions(TypedDict, total=False):
    """The fields of :class:`SamplingParams` as keyword arguments of a call."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    suppress_tokens: Sequence[int] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool
    ignore_eos: bool
    logprobs: bool


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
        raise _fail("sampling", "SamplingParams, or one for each prompt", sampling)
    if len(params) != count:
        raise ValueError(f"sampling: expected one for each of {count} prompts, got {len(params)}")
    for index, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise _fail(f"sampling[{index}]", "SamplingParams", one)
    return [replace(one, **options) for one in params] if options else params


def sampling_row(params: SamplingParams, prompt_len: int) -> torch.Tensor:
    """One request's sampling as kernels read it.

    Args:
        params: a request that samples needs a seed (``with_seed``).
        prompt_len: presence and frequency penalties count the history from there on.

    Returns:
        ``[8]`` int64, the fields of ``csrc/core/sampling_row.h``; without biases, whose places in a
        batch :class:`SamplingRows` knows.

    Raises:
        ValueError: the seed is missing.
    """
    p = params.with_defaults()
    if p.seed is None and not p.is_greedy:
        raise _fail("seed", "a seed for a sequence that samples (see with_seed)", None)
    packed = _ROW.pack(
        p.top_p,
        p.temperature,
        p.min_p,
        p.repetition_penalty,
        p.presence_penalty,
        p.frequency_penalty,
        p.top_k or 0,
        prompt_len,
        0,
        (p.seed or 0) % 2**64,
        0,
        0,
    )
    return torch.frombuffer(bytearray(packed), dtype=torch.int64)


@dataclass(frozen=True)
class SamplingTable:
    """The sampling parameters of a batch as the kernels read them (:class:`SamplingRows`)."""

    rows: torch.Tensor
    """``[B, 8]`` int64: a :func:`sampling_row` each, and where its biases lie."""
    bias_ids: torch.Tensor | None
    """``[K]`` int32: every sequence's logit_bias ids, packed; rows hold the bounds."""
    bias_values: torch.Tensor | None
    """``[K]`` float32."""
    workspace: torch.Tensor | None
    """``[parts, size]`` float32 scratch; None when every sequence is greedy and unedited.
    One acceptance at a time may use it."""
    vocab_size: int
    want_logprobs: bool
    """Whether any sequence asked for log-probabilities."""

    @classmethod
    def build(
        cls, params: Sequence[SamplingParams], prompt_lens: Sequence[int], vocab_size: int
    ) -> SamplingTable:
        """The table of B parameter sets, once.

        Args:
            params: one per sequence. A sequence that samples needs a seed (``with_seed``).
            prompt_lens: the length of each prompt; presence and frequency penalties count the
                history from there on.
            vocab_size: V of the logits.

        Raises:
            ValueError: lengths differ, a seed is missing, or a logit_bias id is not below V.
        """
        if len(params) != len(prompt_lens):
            raise _fail("prompt_lens", f"{len(params)} lengths", list(prompt_lens))
        rows = SamplingRows(len(params), vocab_size)
        for row, (p, prompt_len) in enumerate(zip(params, prompt_lens, strict=True)):
            rows.write(row, p, prompt_len)
        return rows.table(len(params))


class SamplingRows:
    """Rows of sampling parameters, written one at a time as sequences come and go.

    Args:
        capacity: rows there are.
        vocab_size: V of the logits.
    """

    def __init__(self, capacity: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows = torch.zeros(capacity, _ROW_WORDS, dtype=torch.int64)
        self._view = self._rows.numpy()  # the same memory
        self._params = [SamplingParams()] * capacity
        self._workspace: torch.Tensor | None = None

    def write(self, row: int, params: SamplingParams, prompt_len: int) -> None:
        """A sequence's parameters.

        Raises:
            ValueError: a seed is missing, or a logit_bias id is not below V.
        """
        params = params.with_defaults()
        most = max(params.logit_bias or (), default=0)
        if most >= self._vocab_size:
            raise _fail(f"logit_bias (row {row})", f"token ids < {self._vocab_size}", most)
        self._view[row] = sampling_row(params, prompt_len).numpy()
        self._params[row] = params

    def move(self, source: int, row: int) -> None:
        """A row takes another's place."""
        self._view[row] = self._view[source]
        self._params[row] = self._params[source]

    def table(self, count: int) -> SamplingTable:
        """The first ``count`` rows, valid until one is written."""
        params = self._params[:count]
        ids, values = self._packed_biases(count)
        needs_scratch = any(not p.is_greedy or p.edits_logits for p in params)
        return SamplingTable(
            rows=self._rows[:count],
            bias_ids=torch.tensor(ids, dtype=torch.int32) if ids else None,
            bias_values=torch.tensor(values, dtype=torch.float32) if ids else None,
            workspace=self._scratch(count) if needs_scratch else None,
            vocab_size=self._vocab_size,
            want_logprobs=any(p.logprobs for p in params),
        )

    def _packed_biases(self, count: int) -> tuple[list[int], list[float]]:
        """Ids and values of all rows; each row is told its bounds."""
        ids: list[int] = []
        values: list[float] = []
        for row, p in enumerate(self._params[:count]):
            begin = len(ids)
            for token, bias in sorted((p.logit_bias or {}).items()):
                ids.append(token)
                values.append(bias)
            self._view[row, _BIAS_BOUNDS:] = begin, len(ids)
        return ids, values

    def _scratch(self, count: int) -> torch.Tensor:
        num_parts = max(1, min(count, torch.get_num_threads()))
        if self._workspace is None or len(self._workspace) < num_parts:
            self._workspace = torch.empty(num_parts, workspace_size(self._vocab_size))
        return self._workspace[:num_parts]
