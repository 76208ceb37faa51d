"""Rounds of an engine over a model in memory, timed as a whole, on the GPU, and stage by stage."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

from bench.end_to_end_contenders import Job, NoTokenizer
from bench.timed_steps import TimedSteps
from specrt import accept, ops
from specrt.device import Device, Mark
from specrt.draft.base import Drafter, DraftParams, StageTimes
from specrt.engine.engine import Engine
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams

STAGES = ("propose", "settle", "verify", "accept", "commit")
_SPARE_TOKENS = 256
"""Of the cache, for trees past the last token."""
MARKED: Mapping[str, ModuleType] = {"tree_settle": ops, "tree_accept": accept, "kv_commit": ops}
"""Ops that a stage begins with, and where they are looked up."""
Marks = dict[str, list[tuple[Mark, Mark]]]


@dataclass(frozen=True)
class Timed:
    """Of a prompt's rounds, all but the first, which waits for the prompt's pass."""

    token_ids: Sequence[int]
    num_tokens: int
    num_rounds: int
    seconds: float
    gpu_seconds: float | None
    """Of the captured steps of a round; None if none was launched."""
    stages_ms: Mapping[str, float]
    """By the device's marks, where stages are apart."""
    parts_ms: StageTimes
    """Of a round, by the device's clock where it was launched as a whole."""

    @property
    def round_seconds(self) -> float:
        return self.seconds / self.num_rounds

    @property
    def token_seconds(self) -> float:
        return self.seconds / self.num_tokens

    @property
    def gap(self) -> float | None:
        """The share of a round in which the GPU waits for the host."""
        return None if self.gpu_seconds is None else 1 - self.gpu_seconds / self.round_seconds


class Rounds:
    """An engine that answers one prompt at a time.

    Args:
        model: the target, on a device that times its steps.
        drafter: new.
        job: what is generated.
        around: what a run happens in, as another ``linear``.
        is_apart: whether stages are marked; only where nothing is captured, for a mark in a graph
            tells no time.
        draft: the trees' shape; None leaves it to the drafter.
    """

    def __init__(
        self,
        model: LlamaModel,
        drafter: Drafter,
        job: Job,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        is_apart: bool = False,
        draft: DraftParams | None = None,
    ) -> None:
        assert isinstance(model.device, TimedSteps), "a model whose steps are timed"
        self._device, self._job, self._around = model.device, job, around
        self._draft = draft
        self._marked = MARKED if is_apart else {}
        room = len(job.prompt) + job.num_tokens + _SPARE_TOKENS
        tokenizer: Any = NoTokenizer()
        with around():
            limits = {"max_batch": 1, "max_cached_tokens": room, "max_shared_tokens": 0}
            self._engine = Engine(model, drafter, tokenizer, **limits)

    def run(self) -> Timed:
        """Answer the prompt once; the first time loads and captures what later ones launch."""
        params = SamplingParams(max_new_tokens=self._job.num_tokens, ignore_eos=True)
        times, counts, result, num_before = [], [], None, 0
        self._device.take_seconds()
        with self._around(), marked(self._device, self._marked) as marks:
            for chunk in self._engine.stream([self._job.prompt], params, self._draft):
                if not times:
                    num_before = self._device.num_timed  # the prompt's and the first round's
                    marks.update({name: [] for name in marks})
                times.append(time.perf_counter())
                counts.append(len(chunk.token_ids))
                result = chunk.result
        assert result is not None, "the last chunk has the result"
        if result.error is not None:
            raise RuntimeError(result.error)
        stats = result.stats
        of_parts = stats.draft_ms, stats.verify_ms, stats.accept_ms
        steps, num_rounds = self._device.take_seconds()[num_before:], len(counts) - 1
        return Timed(
            result.token_ids,
            sum(counts[1:]),
            num_rounds,
            times[-1] - times[0],
            _a_round(steps, num_rounds),
            stages_ms(self._device, marks),
            StageTimes(*(ms / stats.num_rounds for ms in of_parts)),
        )

    def close(self) -> None:
        """Free the engine's memory."""
        self._engine.close()


def in_turn(contenders: Mapping[str, Rounds], repeats: int) -> dict[str, Timed]:
    """The median run of each, A B A B, after one of each that does not count."""
    for one in contenders.values():
        one.run()
    runs: dict[str, list[Timed]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, one in contenders.items():
            runs[name].append(one.run())
    return {
        name: sorted(found, key=lambda run: run.seconds)[len(found) // 2]
        for name, found in runs.items()
    }


def _a_round(steps: Sequence[float], num_rounds: int) -> float | None:
    """Of a round's steps; one more or less than whole rounds may be among them."""
    if not steps:
        return None
    return sum(steps) / len(steps) * max(1, round(len(steps) / num_rounds))


# --- stages -----------------------------------------------------------------------------------


@contextmanager
def marked(device: Device, names: Mapping[str, ModuleType]) -> Iterator[Marks]:
    """Meanwhile calls of these functions are marked before and behind.

    Args:
        device: that they launch on.
        names: of functions, with the modules in which their callers look them up.
    """
    marks: Marks = {name: [] for name in names}

    def marking(name: str, op: Callable[..., object]) -> Callable[..., object]:
        def launch(*args: Any, **kwargs: Any) -> object:
            start = device.mark()
            found = op(*args, **kwargs)
            marks[name].append((start, device.mark()))
            return found

        return launch

    with ExitStack() as patches:
        for name, module in names.items():
            patches.enter_context(patch.object(module, name, marking(name, getattr(module, name))))
        yield marks


def stages_ms(device: Device, marks: Marks) -> dict[str, float]:
    """Milliseconds of a round's stages, each a median.

    Proposing is what lies between a commit and the next settling: the drafter's launches, and what
    the host takes meanwhile.

    Args:
        device: that gave the marks.
        marks: of :data:`MARKED`; empty if a stage was not called.
    """
    if not all(marks.get(name) for name in MARKED):
        return {}
    settled, accepted, committed = (marks[name] for name in MARKED)

    def median(pairs: Iterable[tuple[Mark, Mark]]) -> float:
        return statistics.median([device.ms_between(*pair) for pair in pairs] or [0.0])

    return {
        "propose": median((a[1], b[0]) for a, b in zip(committed, settled[1:], strict=False)),
        "settle": median(settled),
        "verify": median((a[1], b[0]) for a, b in zip(settled, accepted, strict=False)),
        "accept": median((a[0], b[0]) for a, b in zip(accepted, committed, strict=False)),
        "commit": median(committed),
    }
