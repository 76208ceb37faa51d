"""Ways to generate the same tokens on a GPU: our engine over a model in memory, and transformers.

Both take token ids. Times are of all rounds but the first, which waits for the prompt's pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from bench.contenders import Clock
from bench.timed_steps import TimedSteps
from specrt.draft.base import Drafter, DraftParams
from specrt.engine.engine import Engine
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from specrt.types import RoundStats


class NoTokenizer:
    """Prompts are token ids, and nobody reads the text."""

    special_tokens: Mapping[int, str] = MappingProxyType({})

    def encode(self, text: str) -> list[int]:
        raise ValueError("prompt: expected token ids")

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""


@dataclass(frozen=True)
class Generated:
    """What came of a prompt, and the time of all rounds but the first."""

    token_ids: list[int]
    num_timed: int
    """Tokens that came after the first round."""
    seconds: float
    num_rounds: int
    logprobs: list[float] | None = None
    gpu_seconds: float | None = None
    """Of the passes of one round."""
    parts_ms: tuple[float, float, float] | None = None
    """Of a round: drafting, verifying, from logits to the report."""
    reads: float | None = None
    """Times a round that the host waited for something to read."""

    @property
    def round_seconds(self) -> float:
        return self.seconds / self.num_rounds

    @property
    def token_seconds(self) -> float:
        return self.seconds / self.num_timed


@dataclass(frozen=True)
class Job:
    """What is generated: tokens enough for two rounds at least."""

    prompt: list[int]
    num_tokens: int
    repeats: int


class Ours:
    """This package's engine over a model, with or without graphs; ``draft`` is its trees' shape."""

    def __init__(
        self,
        model: LlamaModel,
        drafter: Drafter,
        graphs: TimedSteps | None,
        draft: DraftParams | None = None,
    ) -> None:
        tokenizer: Any = NoTokenizer()
        self._engine = Engine(model, drafter, tokenizer, max_batch=1, max_shared_tokens=0)
        self._graphs = graphs
        self._device, self._draft = model.device, draft

    def checked(self, job: Job) -> Generated:
        """Untimed: it loads and records what the timed ones run, and its bits are looked at."""
        return self._run(job, logprobs=True)

    def timed(self, job: Job) -> Generated:
        """The median of several runs."""
        runs = sorted((self._run(job) for _ in range(job.repeats)), key=lambda run: run.seconds)
        return runs[len(runs) // 2]

    def _run(self, job: Job, *, logprobs: bool = False) -> Generated:
        params = SamplingParams(max_new_tokens=job.num_tokens, ignore_eos=True, logprobs=logprobs)
        if self._graphs:
            self._graphs.take_seconds()
        times, counts, result = [], [], None
        reads = self._device.num_reads
        for chunk in self._engine.stream([job.prompt], params, self._draft):
            times.append(time.perf_counter())
            counts.append(len(chunk.token_ids))
            result = chunk.result
        assert result is not None, "the last chunk has the result"
        if result.error is not None:
            raise RuntimeError(result.error)
        passes = self._graphs.take_seconds() if self._graphs else []
        return Generated(
            result.token_ids,
            sum(counts[1:]),
            times[-1] - times[0],
            len(counts) - 1,
            result.logprobs,
            statistics.median(passes[1 - len(counts) :]) if passes else None,
            _parts(result.stats),
            (self._device.num_reads - reads) / len(counts),
        )


def _parts(stats: RoundStats) -> tuple[float, float, float]:
    """Milliseconds of a round."""
    count = stats.num_rounds
    return stats.draft_ms / count, stats.verify_ms / count, stats.accept_ms / count


class Transformers:
    """``transformers``' own ``generate`` with a static cache.

    Args:
        model: its model.
        is_compiled: as it does by itself on a GPU; else eagerly.
    """

    def __init__(self, model: Any, is_compiled: bool) -> None:
        self._model = model
        self._is_compiled = is_compiled

    def timed(self, job: Job) -> Generated:
        """The median of several runs, after one that is not counted."""
        runs = [self._run(job) for _ in range(1 + job.repeats)][1:]
        return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]

    def _run(self, job: Job) -> Generated:
        ids, clock = torch.tensor([job.prompt], device=self._model.device), Clock()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job.num_tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            disable_compile=not self._is_compiled,
            streamer=clock,
        )
        found = clock.output(output[0, ids.shape[1] :].tolist())
        return Generated(found.token_ids, found.num_timed, found.seconds, found.num_rounds - 1)
