"""Whole rounds on a GPU: the rows of ``python -m bench.bench_round --device cuda``.

A case is a target's shape and a tree's size: plain decoding, or trees with replayed acceptance. Its
parts are measured one by one, and one that fails leaves the others: the round as the engine runs
it; its stages, launched one by one; ours against the library's ``linear`` in the same graph of
torch's; transformers.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bench import gpu
from bench.end_to_end_cuda import Bench, make_job
from bench.gpu import Contender, Device
from bench.gpu_report import Measured, WrongResultError, run_bench
from bench.harness import Row
from bench.library_linear import in_place_of_ours
from bench.limits import Ceilings
from bench.planted import PlantedDrafter, recorded_trace
from bench.random_target import SPECS
from bench.round_runs import STAGES, Rounds, Timed, in_turn
from bench.timed_steps import TimedSteps, TorchGraphs
from bench.transformers_graph import TransformersStep
from specrt.draft.base import Drafter, EmptyDrafter
from specrt.models.model import LlamaModel

PLAIN = "plain"
REPLAYED = "replayed acceptance, drafting not counted"
OURS, LIBRARY, TRANSFORMERS = "ours", "cublas", "transformers"
Part = TypeVar("Part")
_CASE_SECONDS = 40.0
"""That a case may take: with less left of the budget none is begun."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    nodes: int

    def __str__(self) -> str:
        return f"{self.model} {self.nodes} nodes"


def cases(is_quick: bool) -> Iterator[Case]:
    """Plain decoding of the goals' target first; all of a target together, as it is in memory."""
    for model in list(SPECS)[: 1 if is_quick else None]:
        for nodes in (1, 60) if is_quick or model != next(iter(SPECS)) else (1, 60, 8):
            yield Case(model, nodes)


class Targets:
    """The targets, of which one is in memory.

    Args:
        device: where.
        args: of the command.
    """

    def __init__(self, device: Device, args: argparse.Namespace) -> None:
        self._device, self._args = device, args
        self._held: tuple[str, Bench] | None = None
        self.plain: dict[str, Timed] = {}
        """Plain decoding as the engine runs it, which others are compared with."""

    def of(self, name: str) -> Bench:
        """By its name; the one before is let go of."""
        if self._held is None or self._held[0] != name:
            if self._held is not None:
                self._held = None
                gc.collect()
            is_real = self._device.place.device == "cuda"
            vocab_size = SPECS[name].vocab_size if is_real else 500
            job = make_job(self._args, self._device, vocab_size)
            self._held = name, Bench(self._device, name, job)
        return self._held[1]


# --- parts ------------------------------------------------------------------------------------


def _drafter(case: Case, bench: Bench, steps: TimedSteps) -> Drafter:
    if case.nodes == 1:
        return EmptyDrafter()
    trace, vocab_size = recorded_trace(case.nodes), bench.config.vocab_size
    return PlantedDrafter(bench.expected.token_ids, trace, vocab_size, steps)


def _rounds(case: Case, bench: Bench, steps: TimedSteps, **options: Any) -> Rounds:
    model = LlamaModel(bench.config, bench.weights, steps)
    return Rounds(model, _drafter(case, bench, steps), bench.job, **options)


def _measured(contenders: Mapping[str, Rounds], repeats: int) -> dict[str, Timed]:
    try:
        return in_turn(contenders, repeats)
    finally:
        for one in contenders.values():
            one.close()


def whole(case: Case, bench: Bench) -> Timed:
    """As the engine runs it."""
    steps = TimedSteps(bench.weights.embed.device)
    return _measured({OURS: _rounds(case, bench, steps)}, bench.job.repeats)[OURS]


def stages(case: Case, bench: Bench) -> Timed:
    """Stage by stage: nothing is captured."""
    steps = TimedSteps(bench.weights.embed.device, is_eager=True)
    return _measured({OURS: _rounds(case, bench, steps, is_apart=True)}, 1)[OURS]


def price(case: Case, bench: Bench) -> dict[str, Timed]:
    """Ours and the library's at the true number of rows, in turn, in the same graph."""
    place = bench.weights.embed.device
    both = {
        OURS: _rounds(case, bench, TorchGraphs(place)),
        LIBRARY: _rounds(case, bench, TorchGraphs(place), around=in_place_of_ours),
    }
    return _measured(both, bench.job.repeats)


def transformers_seconds(bench: Bench, device: Device) -> float:
    """Of a token.

    Raises:
        RuntimeError: it cannot be measured here.
    """
    step = TransformersStep(bench.twin, bench.job.prompt, bench.job.num_tokens)
    timings = device.measure({TRANSFORMERS: Contender(step.launches, step.reset)})
    if TRANSFORMERS in timings.failures:
        raise RuntimeError(timings.failures[TRANSFORMERS])
    return timings.graph[TRANSFORMERS]


# --- rows -------------------------------------------------------------------------------------


def one_case(
    case: Case, device: Device, ceilings: Ceilings, l2_bytes: int, targets: Targets
) -> Measured:
    """A row; parts of it that failed are named.

    Args:
        case: which.
        device: to measure on.
        ceilings: its.
        l2_bytes: not asked for: a round reads more than any cache holds.
        targets: the models.

    Raises:
        WrongResultError: the tokens are not plain decoding's.
    """
    bench, failures = targets.of(case.model), dict[str, str]()
    device.free_bytes()
    timed = whole(case, bench)
    if case.nodes == 1:
        targets.plain[case.model] = timed
    apart = _tried("stages", lambda: stages(case, bench), failures)
    both = _tried(LIBRARY, lambda: price(case, bench), failures)
    theirs = None
    if case.nodes == 1:
        theirs = _tried(TRANSFORMERS, lambda: transformers_seconds(bench, device), failures)
    row = _row(case, timed, targets.plain.get(case.model), bench, ceilings)
    row |= {
        f"{stage} ms": None if apart is None else apart.stages_ms.get(stage) for stage in STAGES
    }
    row |= _price(both)
    row["transformers ms"] = None if theirs is None else 1e3 * theirs
    row["x transformers"] = None if theirs is None else theirs / timed.token_seconds
    wrong = [
        name
        for name, found in (("in graphs", timed), ("stage by stage", apart))
        if found is not None and list(found.token_ids) != bench.expected.token_ids
    ]
    row["equal"] = f"not {' or '.join(wrong)}" if wrong else "all tokens"
    if wrong:
        raise WrongResultError(f"tokens are not plain decoding's {' or '.join(wrong)}", row)
    return row, failures


def _tried(name: str, measured: Callable[[], Part], failures: dict[str, str]) -> Part | None:
    """A part that fails leaves the others."""
    try:
        return measured()
    except Exception as error:
        failures[name] = gpu.reason(error)
        return None


def _row(case: Case, timed: Timed, plain: Timed | None, bench: Bench, ceilings: Ceilings) -> Row:
    least = bench.round_bytes / ceilings.bytes_per_s
    is_replayed = case.nodes > 1
    return {
        "model": case.model,
        "contender": REPLAYED if is_replayed else PLAIN,
        "nodes": case.nodes,
        "tau": timed.num_tokens / timed.num_rounds,
        "ms a token": 1e3 * timed.token_seconds,
        "x plain": plain.token_seconds / timed.token_seconds if is_replayed and plain else None,
        "ms a round": 1e3 * timed.round_seconds,
        "gpu ms": None if timed.gpu_seconds is None else 1e3 * timed.gpu_seconds,
        "host gap %": None if timed.gap is None else 100 * timed.gap,
        "% of limit": 100 * least / timed.round_seconds,
    }


def _price(both: Mapping[str, Timed] | None) -> Row:
    """What a round takes more than with the library's rows, by the GPU's time of both."""
    row: Row = {"ours gpu ms": None, "cublas gpu ms": None, "price %": None}
    if both is None or any(one.gpu_seconds is None for one in both.values()):
        return row
    ours, library = (both[name].gpu_seconds or 0.0 for name in (OURS, LIBRARY))
    found = {"ours gpu ms": 1e3 * ours, "cublas gpu ms": 1e3 * library}
    return row | found | {"price %": 100 * (ours / library - 1)}


def run(args: argparse.Namespace, device: Device) -> None:
    """Measure and report what the budget allows."""
    torch.manual_seed(0)
    targets = Targets(device, args)
    chosen = [case for case in cases(args.quick) if args.model in (None, case.model)]

    def measured(case: Case, on: Device, ceilings: Ceilings, l2_bytes: int) -> Measured:
        return one_case(case, on, ceilings, l2_bytes, targets)

    budget = max(1.0, args.budget - _CASE_SECONDS) if args.budget else None
    within = argparse.Namespace(**{**vars(args), "budget": budget})
    run_bench("round_cuda", chosen, measured, within, device)
