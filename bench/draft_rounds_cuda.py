"""Rounds with our drafters on a GPU: rows of ``python -m bench.bench_round --drafter NAME``.

Target and drafter have random weights and a real model's shape, so a drafter is right by chance
alone: what is measured is what a round takes, beside plain decoding's in the same run, and no
speed-up follows from it. Where it says ``planted``, trees of a recorded acceptance are verified
after all the drafting is done: what such a drafter would win.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from bench.draft_rounds import EAGLE2, EESD, FSPAD, REDUCED
from bench.end_to_end_cuda import Bench
from bench.gpu import Device
from bench.gpu_report import Measured, WrongResultError, run_bench
from bench.harness import Row
from bench.limits import Ceilings
from bench.planted import PlantedRounds, recorded_trace
from bench.round_cuda import Targets
from bench.round_model import NAME_OF_GOALS, STREAMING
from bench.round_runs import Rounds, Timed, in_turn
from bench.timed_steps import TimedSteps
from bench.whole_rounds import EESD as EESD_ROUND
from bench.whole_rounds import (
    MAKERS,
    Layer,
    LayerKind,
    WholeRound,
    layer_round,
    random_layer,
)
from specrt.draft.base import EmptyDrafter, LaunchedDrafter
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.models.model import LlamaModel

PLAIN, GRAPH, EAGER, PLANTED = "plain", "graph", "eager", "planted"
KINDS = {FSPAD: "fspad", EAGLE2: "eagle2"}
_CASE_SECONDS = 60.0
"""That a case may take: with less left of the budget none is begun."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    drafter: str
    layer: LayerKind | None = None
    """Of FSPAD and EAGLE-2."""

    def __str__(self) -> str:
        if self.layer is None:
            return f"{self.model} {self.drafter}"
        head = "whole head" if self.layer.head_rows is None else f"head of {self.layer.head_rows:,}"
        fold = ", folded" if self.layer.is_folded else ""
        size = ", fp8" if self.layer.is_narrow else ""
        return f"{self.model} {self.drafter}, {head}{fold}{size}"


def cases(model: str, drafter: str, vocab_size: int, is_quick: bool) -> Iterator[Case]:
    """Those of the goals first: a reduced vocabulary and, of FSPAD, folded tables."""
    if drafter == EESD:
        yield Case(model, drafter)
        return
    kind = LayerKind(KINDS[drafter], min(REDUCED, vocab_size // 2), drafter == FSPAD)
    yield Case(model, drafter, kind)
    yield Case(model, drafter, replace(kind, is_narrow=True))
    if not is_quick:
        yield Case(model, drafter, LayerKind(KINDS[drafter]))


# --- contenders -------------------------------------------------------------------------------


class Contenders:
    """Engines over one target's weights, and one layer's.

    Args:
        case: whose.
        bench: the target.
    """

    def __init__(self, case: Case, bench: Bench) -> None:
        self._case, self._bench = case, bench
        self._layer: Layer | None = None
        self.round: WholeRound | None = None
        """The last one that was made."""

    def rounds(self) -> dict[str, Rounds]:
        """Plain decoding, and the drafter's rounds as the engine runs them, launched one by one,
        and with a planted acceptance, of which there is a record for its trees alone."""
        job, plain = self._bench.job, self._model()
        found = {PLAIN: Rounds(plain, EmptyDrafter(), job)}
        for name in (GRAPH, EAGER):
            model = self._model(is_eager=name == EAGER)
            made = self._round(model)
            found[name] = Rounds(model, made.drafter, job, draft=made.params)
        if self._case.layer is not None:
            model = self._model()
            made = self._round(model)
            assert isinstance(made.drafter, FspadDrafter)
            trace, config = recorded_trace(made.num_nodes), self._bench.config
            answer = self._bench.expected.token_ids
            drafter = PlantedRounds(made.drafter, answer, trace, config.vocab_size, model.device)
            found[PLANTED] = Rounds(model, drafter, job, draft=made.params)
        return found

    def _model(self, *, is_eager: bool = False) -> LlamaModel:
        weights = self._bench.weights
        steps = TimedSteps(weights.embed.device, is_eager=is_eager)
        return LlamaModel(self._bench.config, weights, steps)

    def _round(self, model: LlamaModel) -> WholeRound:
        kind = self._case.layer
        if kind is None:
            self.round = MAKERS[EESD_ROUND](model)
        else:
            if self._layer is None:
                self._layer = random_layer(model, kind)
            self.round = layer_round(model, self._layer)
        return self.round


# --- rows -------------------------------------------------------------------------------------


def one_case(
    case: Case, device: Device, ceilings: Ceilings, l2_bytes: int, targets: Targets
) -> Measured:
    """A row.

    Args:
        case: which.
        device: to measure on.
        ceilings: its.
        l2_bytes: not asked for: a round reads more than any cache holds.
        targets: the models.

    Raises:
        WrongResultError: the tokens are not plain decoding's.
    """
    bench = targets.of(case.model)
    device.free_bytes()
    contenders = Contenders(case, bench)
    rounds = contenders.rounds()
    try:
        timed = in_turn(rounds, bench.job.repeats)
    finally:
        for one in rounds.values():
            one.close()
    made = contenders.round
    assert made is not None
    row = _row(case, timed, made, ceilings)
    expected = bench.expected.token_ids
    wrong = [name for name, found in timed.items() if list(found.token_ids) != expected]
    row["equal"] = f"not {', '.join(wrong)}" if wrong else "all tokens"
    if wrong:
        raise WrongResultError(f"tokens are not plain decoding's: {', '.join(wrong)}", row)
    return row, {}


def _row(case: Case, timed: Mapping[str, Timed], made: WholeRound, ceilings: Ceilings) -> Row:
    plain, graph, parts = timed[PLAIN], timed[GRAPH], timed[GRAPH].parts_ms
    draft_ms = 1e3 * made.draft_bytes / (STREAMING * ceilings.bytes_per_s)
    planted = timed.get(PLANTED)
    return {
        "model": case.model,
        "drafter": str(case).removeprefix(f"{case.model} "),
        "nodes": made.num_nodes,
        "launched": isinstance(made.drafter, LaunchedDrafter),
        "tau by chance": graph.num_tokens / graph.num_rounds,
        "plain ms a round": 1e3 * plain.round_seconds,
        "ms a round": 1e3 * graph.round_seconds,
        "x plain round": graph.round_seconds / plain.round_seconds,
        "eager ms a round": 1e3 * timed[EAGER].round_seconds,
        "gpu ms": None if graph.gpu_seconds is None else 1e3 * graph.gpu_seconds,
        "host gap %": None if graph.gap is None else 100 * graph.gap,
        "draft ms": parts.draft,
        "verify ms": parts.verify,
        "accept ms": parts.accept,
        "draft x streaming": parts.draft / draft_ms,
        "planted tau": None if planted is None else planted.num_tokens / planted.num_rounds,
        "planted x plain": None if planted is None else plain.token_seconds / planted.token_seconds,
    }


def run(args: argparse.Namespace, device: Device) -> None:
    """Measure and report what the budget allows."""
    torch.manual_seed(0)
    targets = Targets(device, args)
    name = args.model or NAME_OF_GOALS
    vocab_size = targets.of(name).config.vocab_size

    def measured(case: Case, on: Device, ceilings: Ceilings, l2_bytes: int) -> Measured:
        return one_case(case, on, ceilings, l2_bytes, targets)

    budget = max(1.0, args.budget - _CASE_SECONDS) if args.budget else None
    within = argparse.Namespace(**{**vars(args), "budget": budget})
    chosen = cases(name, args.drafter, vocab_size, args.quick)
    run_bench(f"round_cuda_{args.drafter}", chosen, measured, within, device)
