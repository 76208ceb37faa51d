"""Plain decoding against a drafter on somebody's own prompts, in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

from specrt.device import Device
from specrt.draft.base import Drafter, EmptyDrafter
from specrt.engine.engine import Engine
from specrt.engine.prompts import Prompt
from specrt.engine.results import GenerationResult
from specrt.sampling import SamplingParams
from specrt.types import GenerationError

PLAIN = "plain"


@dataclass(frozen=True)
class Measurement:
    """What one contender did with one prompt."""

    result: GenerationResult
    """Of the first timed run; every run says the same."""
    seconds: list[float]
    """Wall time of each timed run, the prompt's own pass included."""
    prefill_seconds: list[float]
    """Of these, the prompt's own pass."""

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return len(self.result.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the median time."""
        return self.num_tokens / median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """One prompt's measurements, by contender; :data:`PLAIN` is always one of them."""

    measurements: Mapping[str, Measurement]

    def num_equal(self, name: str) -> int:
        """Length of the common beginning of a contender's tokens and plain decoding's."""
        plain = self.measurements[PLAIN].result.token_ids
        other = self.measurements[name].result.token_ids
        differing = (i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b)
        return next(differing, min(len(plain), len(other)))

    def is_equal(self, name: str) -> bool:
        """Whether a contender gave plain decoding's tokens, all of them and no others."""
        plain = self.measurements[PLAIN].result.token_ids
        return self.measurements[name].result.token_ids == plain

    def speedup(self, name: str) -> float:
        """Plain decoding's median time over the contender's."""
        plain, other = self.measurements[PLAIN], self.measurements[name]
        return median(plain.seconds) / median(other.seconds)

    def difference(self, name: str) -> Difference | None:
        """Where a contender's tokens part from plain decoding's; None: nowhere."""
        if self.is_equal(name):
            return None
        place = self.num_equal(name)
        sides = (self.measurements[key].result.token_ids[place:] for key in (PLAIN, name))
        return Difference(place, *(side[0] if side else None for side in sides))

    def figures(self) -> dict[str, Figures]:
        """All that is summed, by contender."""
        return {name: self._figures(name) for name in self.measurements}

    def _figures(self, name: str) -> Figures:
        measured = self.measurements[name]
        stats = measured.result.stats
        return Figures(
            num_tokens=measured.num_tokens,
            num_rounds=stats.num_rounds,
            num_draft_tokens=stats.num_draft_tokens,
            num_accepted_tokens=stats.num_accepted_tokens,
            seconds=measured.seconds,
            prefill_seconds=measured.prefill_seconds,
            difference=self.difference(name),
        )


@dataclass(frozen=True)
class Difference:
    """Where a contender's tokens part from plain decoding's."""

    position: int
    """Of the first that differs, among the tokens generated."""
    plain: int | None
    """Plain decoding's token there; None: it had ended."""
    other: int | None
    """The contender's."""


@dataclass(frozen=True)
class Figures:
    """What sums and tables need of one contender on one prompt."""

    num_tokens: int
    num_rounds: int
    num_draft_tokens: int
    num_accepted_tokens: int
    seconds: list[float]
    """As :attr:`Measurement.seconds`."""
    prefill_seconds: list[float]
    """Of these, the prompt's own pass, the target's and the drafter's."""
    difference: Difference | None
    """None: plain decoding's tokens, all of them and no others."""

    @property
    def num_equal(self) -> int:
        """Length of the common beginning with plain decoding's tokens."""
        return self.num_tokens if self.difference is None else self.difference.position

    @property
    def decode_seconds(self) -> float:
        """Median over the runs of the time behind the prompt's own pass."""
        pairs = zip(self.seconds, self.prefill_seconds, strict=True)
        return median(whole - prefill for whole, prefill in pairs)


@dataclass
class Summary:
    """One contender over all prompts. ``tau`` is the mean of accept_length + 1 per round."""

    name: str
    num_tokens: int = 0
    num_equal: int = 0
    num_prompts: int = 0
    num_equal_prompts: int = 0
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    seconds: float = 0.0
    """Sum over the prompts of the median time."""
    speedup: float = 1.0
    """Plain decoding's ``seconds`` over this contender's."""
    decode_seconds: float = 0.0
    """As ``seconds``, without the prompts' own passes."""
    decode_speedup: float = 1.0
    """Plain decoding's ``decode_seconds`` over this contender's."""
    speedups: list[float] = field(default_factory=list)
    """Of each prompt."""

    @property
    def tau(self) -> float:
        """Mean of accept_length + 1 per round, over all prompts: their tokens by their rounds."""
        return 1.0 + self.num_accepted_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the sum of median times."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "num_prompts": self.num_prompts,
            "num_equal_prompts": self.num_equal_prompts,
            "num_tokens": self.num_tokens,
            "num_equal_tokens": self.num_equal,
            "tau": self.tau,
            "num_rounds": self.num_rounds,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "speedup": self.speedup,
            "decode_seconds": self.decode_seconds,
            "decode_speedup": self.decode_speedup,
            "speedup_median": median(self.speedups) if self.speedups else 1.0,
        }


def without_drafter(engine: Engine) -> Engine:
    """An engine of the same target, in memory once, that decodes plainly."""
    return with_drafter(engine, EmptyDrafter())


def with_drafter(engine: Engine, drafter: Drafter) -> Engine:
    """An engine of the same target, in memory once, with another drafter; each run computes its
    prompts."""
    return Engine(
        engine.target,
        drafter,
        engine.tokenizer,
        max_batch=engine.max_batch,
        max_nodes=engine.max_nodes,
        max_shared_tokens=0,
    )


def warmups(device: Device) -> int:
    """Runs there until nothing is new: a GPU's steps are captured when they come again."""
    return 3 if device.is_gpu else 1


def compare(
    engines: Mapping[str, Engine],
    prompt: Prompt,
    sampling: SamplingParams,
    *,
    repeats: int = 3,
    warmup: int | None = None,
) -> Comparison:
    """Time engines on one prompt, one at a time and in turn (A B A B ...).

    Taking turns makes a machine that slows down slow all alike.

    Args:
        engines: by name; one of them :data:`PLAIN`.
        prompt: as :meth:`Engine.generate` takes it.
        sampling: needs a seed where ``temperature`` is above 0, or the tokens could not be equal.
        repeats: timed runs of each.
        warmup: untimed runs of each before them; None: as many as the device needs.

    Raises:
        ValueError: bad options or prompt.
        GenerationError: a sequence failed, or an engine contradicted itself.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    if sampling.temperature > 0 and sampling.seed is None:
        raise ValueError("seed: expected one where temperature is above 0, got none")
    for engine in engines.values():
        count = warmups(engine.target.device) if warmup is None else warmup
        for _ in range(count):
            _timed(engine, prompt, sampling)
    runs: dict[str, list[tuple[float, GenerationResult]]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            runs[name].append(_timed(engine, prompt, sampling))
            if runs[name][-1][1].token_ids != runs[name][0][1].token_ids:
                raise GenerationError(f"{name}: two runs of one prompt gave different tokens")
    return Comparison(
        {
            name: Measurement(
                timed[0][1],
                [seconds for seconds, _ in timed],
                [result.stats.prefill_ms / 1e3 for _, result in timed],
            )
            for name, timed in runs.items()
        }
    )


def _timed(
    engine: Engine, prompt: Prompt, sampling: SamplingParams
) -> tuple[float, GenerationResult]:
    started = perf_counter()
    result: GenerationResult = engine.generate(prompt, sampling)
    seconds = perf_counter() - started
    if result.error is not None:
        raise GenerationError(result.error)
    return seconds, result


def summarise(name: str, comparisons: Sequence[Comparison]) -> Summary:
    """A contender over all prompts."""
    return sum_figures(name, [comparison.figures() for comparison in comparisons])


def sum_figures(name: str, prompts: Sequence[Mapping[str, Figures]]) -> Summary:
    """A contender over all prompts.

    Args:
        name: of the contender.
        prompts: of each the figures of it and of :data:`PLAIN`.
    """
    summary, plain_seconds, plain_decode_seconds = Summary(name), 0.0, 0.0
    for prompt in prompts:
        one, plain = prompt[name], prompt[PLAIN]
        seconds, against = median(one.seconds), median(plain.seconds)
        summary.num_prompts += 1
        summary.num_tokens += one.num_tokens
        summary.num_equal += one.num_equal
        summary.num_equal_prompts += one.difference is None
        summary.num_rounds += one.num_rounds
        summary.num_draft_tokens += one.num_draft_tokens
        summary.num_accepted_tokens += one.num_accepted_tokens
        summary.seconds += seconds
        summary.decode_seconds += one.decode_seconds
        summary.speedups.append(against / seconds)
        plain_seconds += against
        plain_decode_seconds += plain.decode_seconds
    if summary.seconds:
        summary.speedup = plain_seconds / summary.seconds
    if summary.decode_seconds > 0:
        summary.decode_speedup = plain_decode_seconds / summary.decode_seconds
    return summary
