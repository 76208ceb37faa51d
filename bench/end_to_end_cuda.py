"""Decoding from end to end on a GPU: a random target of Llama-3-8B's shape, made on the device.

Plain decoding; whole rounds of drafters of the target's shape, right by chance alone
(``bench.whole_rounds``); planted acceptance (``bench.planted``: trees of which as much is accepted
as of a recorded drafter's, and whose drafting takes no time); ``transformers`` with a static cache
on the same memory. All are greedy and go on to the last token. ``steps`` are ``graph``, as the
engine runs them on a GPU, or ``eager``, launched one by one.

Ours must say what plain decoding says, to the bits of its log-probabilities. ``transformers``
rounds elsewhere: the tokens until it differs are only counted. Times are of rounds after the first.
``gpu ms`` is a graph's time, by events; ``host %`` is the rest of a round. ``% of copy`` is the
rate at which a round reads weights, keys and values, as a share of a copy's within the device in
the same run. ``draft``, ``verify`` and ``accept ms`` are a round's parts by the device's own marks,
``least`` what a copy of the bytes that they must read would take, ``reads`` how often a round the
host waited to read.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch

from bench import gpu
from bench.end_to_end_contenders import Generated, Job, Ours, Transformers
from bench.gpu import Device
from bench.gpu_report import Measured, WrongResultError, run_bench
from bench.harness import Row, parser, start
from bench.limits import Ceilings, slot_bytes
from bench.planted import NODES, PlantedDrafter, recorded_trace
from bench.random_target import (
    SPECS,
    Spec,
    hf_config,
    random_weights,
    step_bytes,
    transformers_twin,
)
from bench.timed_steps import TimedSteps
from bench.whole_rounds import EESD, FSPAD, LOOKUP, MAKERS, RECYCLE, SIZES, whole_round
from specrt.config import ModelConfig
from specrt.device import Device as Place
from specrt.draft.base import Drafter, EmptyDrafter
from specrt.models.loader import Weights
from specrt.models.model import LlamaModel

PLAIN, PLANTED = "plain", "planted"
TRANSFORMERS, COMPILED = "transformers static", "transformers compiled"
LABELS = {
    PLANTED: "FSPAD's acceptance, planted; drafting not counted",
    FSPAD: "FSPAD of random weights",
    EESD: "EESD, the next layer as exit",
    LOOKUP: "prompt lookup, on a text of noise",
    RECYCLE: "token recycling, on a text of noise",
}
EAGER, GRAPH = "eager", "graph"
_COMPILE_SECONDS = 150.0
"""That compiling may take; with less left of the budget it is not begun."""
_ROOM = 4 << 30
"""Bytes beside the weights: logits, scratch, keys and values."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    contender: str
    steps: str = EAGER
    nodes: int = 1

    def __str__(self) -> str:
        nodes = f" {self.nodes}" if self.contender == PLANTED else ""
        return f"{self.contender}{nodes} {self.steps}"


def cases(is_quick: bool) -> Iterator[Case]:
    """What all are compared with comes first; graphs before eager, which are then told apart."""
    for steps in (GRAPH, EAGER):
        yield Case(PLAIN, steps)
    for drafter in (FSPAD, EESD):
        yield Case(drafter, EAGER, SIZES[drafter])
    for nodes in NODES[: 1 if is_quick else None]:
        for steps in (GRAPH, EAGER):
            yield Case(PLANTED, steps, nodes)
    yield Case(TRANSFORMERS)
    if not is_quick:
        yield Case(LOOKUP)  # of too many sizes to capture
        yield Case(RECYCLE, EAGER, SIZES[RECYCLE])
        yield Case(COMPILED, GRAPH)


# --- the target -------------------------------------------------------------------------------


class Bench:
    """The target, and what plain decoding says.

    Args:
        device: where.
        name: of the shape.
        job: what is generated, by all alike.
    """

    def __init__(self, device: Device, name: str, job: Job) -> None:
        self._device = device
        self.model, self.job = device.targets[name], job
        is_real = device.place.device == "cuda"
        spec = SPECS[name] if is_real else Spec(500, 10000.0, 256)
        self._hf_config = hf_config(self.model, spec)
        self.config = ModelConfig.from_dict(self._hf_config)
        self.gpu_seconds: dict[int, float] = {}
        """What a pass takes on the GPU, by its nodes."""
        self.least_bytes: dict[Case, tuple[int, int]] = {}
        """What drafting and verification must read in a round, of whole rounds."""

    @cached_property
    def weights(self) -> Weights:
        """In memory once, for all.

        Raises:
            MemoryError: there is no room.
        """
        place, free = self._device.place, self._device.free_bytes()
        model, vocab = self.model, self.config.vocab_size
        heads = 2 * model.num_heads + 2 * model.num_kv_heads
        layer = model.hidden_size * (heads * model.head_dim + 3 * model.intermediate_size)
        size = (model.num_layers * layer + 2 * vocab * model.hidden_size) * place.dtype.itemsize
        if place.device == "cuda" and size + _ROOM > free:
            raise MemoryError(f"needs {(size + _ROOM) / 1e9:.0f} GB, {free / 1e9:.0f} are free")
        return random_weights(self.config, place.device, place.dtype)

    @cached_property
    def _eager_model(self) -> LlamaModel:
        place = Place(self.weights.embed.device, is_eager=True)
        return LlamaModel(self.config, self.weights, place)

    @cached_property
    def _graph_model(self) -> tuple[LlamaModel, TimedSteps | None]:
        if self._device.place.device == "cuda":
            graphs = TimedSteps(self.weights.embed.device)
            return LlamaModel(self.config, self.weights, graphs), graphs
        return LlamaModel(self.config, self.weights), None

    @cached_property
    def twin(self) -> Any:
        return transformers_twin(self._hf_config, self.weights)

    @cached_property
    def expected(self) -> Generated:
        """What plain decoding says, launch by launch."""
        return self.ours(Case(PLAIN)).checked(self.job)

    @cached_property
    def plain(self) -> Generated:
        """How fast plain decoding is so, all is compared with it."""
        return self.ours(Case(PLAIN)).timed(self.job)

    def ours(self, case: Case) -> Ours:
        """The engine, with a new drafter of the case's."""
        if case.contender in MAKERS:
            made = whole_round(case.contender, self._eager_model)
            self.least_bytes[case] = made.draft_bytes, made.verify_bytes + self._kv_bytes
            return Ours(self._eager_model, made.drafter, None, made.params)
        if case.steps == EAGER:
            return Ours(self._eager_model, self._drafter(case, self._eager_model), None)
        model, graphs = self._graph_model
        return Ours(model, self._drafter(case, model), graphs)

    def _drafter(self, case: Case, model: LlamaModel) -> Drafter:
        if case.contender == PLANTED:
            trace, vocab_size = recorded_trace(case.nodes), self.config.vocab_size
            return PlantedDrafter(self.expected.token_ids, trace, vocab_size, model.device)
        return EmptyDrafter()

    @property
    def _kv_bytes(self) -> int:
        """Of the keys and values that are there half way."""
        length = len(self.job.prompt) + self.job.num_tokens // 2
        return self.model.num_layers * slot_bytes(self.model) * length

    @property
    def round_bytes(self) -> int:
        """Weights, keys and values."""
        return step_bytes(self.weights) + self._kv_bytes


# --- rows -------------------------------------------------------------------------------------


def one_case(
    case: Case, device: Device, ceilings: Ceilings, l2_bytes: int, *, bench: Bench, end: float
) -> Measured:
    """A row of ours or of ``transformers``.

    Args:
        case: which.
        device: to measure on.
        ceilings: its.
        l2_bytes: not asked for: a pass reads more than any cache holds.
        bench: the target.
        end: of the budget, on the clock of ``time.monotonic``.

    Raises:
        WrongResultError: ours does not say what plain decoding says, to the bit.
    """
    if case.contender in (TRANSFORMERS, COMPILED):
        return _theirs(case, device, ceilings, bench, end)
    ours = bench.ours(case)
    wrong = _difference(ours.checked(bench.job), bench.expected)
    timed = bench.plain if case == Case(PLAIN) else ours.timed(bench.job)
    row = _row(case, timed, bench.plain, bench.round_bytes / ceilings.bytes_per_s)
    row |= {"tau": timed.num_timed / timed.num_rounds, "equal": wrong or "all bits"}
    row |= _parts(case, timed, bench, ceilings.bytes_per_s)
    if timed.gpu_seconds is not None:
        bench.gpu_seconds[case.nodes] = timed.gpu_seconds
    if case.contender in (PLAIN, PLANTED) and case.nodes in bench.gpu_seconds:
        row["gpu ms"] = 1e3 * bench.gpu_seconds[case.nodes]
        row["host %"] = 100 * (1 - row["gpu ms"] / row["ms a round"])
    if wrong:
        raise WrongResultError(wrong, row)
    return row, {}


def _theirs(case: Case, device: Device, ceilings: Ceilings, bench: Bench, end: float) -> Measured:
    """Even where ours fails: then it is compared with nothing."""
    is_compiled = case.contender == COMPILED
    if find_spec("transformers") is None:
        return None, {case.contender: "not installed"}
    if is_compiled and device.place.device != "cuda":
        return None, {case.contender: "not without a GPU"}
    if is_compiled and end - time.monotonic() < _COMPILE_SECONDS:
        return None, {case.contender: f"wants {_COMPILE_SECONDS:.0f} s of the budget"}
    timed = Transformers(bench.twin, is_compiled).timed(bench.job)
    try:
        expected, plain = bench.expected.token_ids, bench.plain
    except Exception:
        return _row(case, timed, None, bench.round_bytes / ceilings.bytes_per_s), {}
    row = _row(case, timed, plain, bench.round_bytes / ceilings.bytes_per_s)
    row["equal"] = f"{_num_same(timed.token_ids, expected)} of {len(expected)} tokens"
    return row, {}


def _row(case: Case, timed: Generated, plain: Generated | None, least_seconds: float) -> Row:
    """All columns, some of them still empty.

    Args:
        case: which.
        timed: what was measured.
        plain: what it is compared with.
        least_seconds: in which a copy moves what a round reads.
    """
    return {
        "contender": LABELS.get(case.contender, case.contender),
        "steps": case.steps,
        "nodes": case.nodes,
        "tau": 1.0,
        "equal": None,
        "tokens/s": 1 / timed.token_seconds,
        "vs plain": None if plain is None else plain.token_seconds / timed.token_seconds,
        "ms a token": 1e3 * timed.token_seconds,
        "ms a round": 1e3 * timed.round_seconds,
        "% of copy": 100 * least_seconds / timed.round_seconds,
        "gpu ms": None,
        "host %": None,
    }


def _parts(case: Case, timed: Generated, bench: Bench, bytes_per_s: float) -> Row:
    """A round's parts, the least that they can take, and its reads."""
    draft, verify = bench.least_bytes.get(case, (0, bench.round_bytes))
    logits = case.nodes * bench.config.vocab_size * 4
    assert timed.parts_ms is not None
    row: Row = {}
    parts = zip(("draft", "verify", "accept"), timed.parts_ms, (draft, verify, logits), strict=True)
    for name, took, num_bytes in parts:
        row |= {f"{name} ms": took, f"{name} least": 1e3 * num_bytes / bytes_per_s}
    return row | {"reads": timed.reads}


def _difference(found: Generated, expected: Generated) -> str:
    """From plain decoding, in tokens or in the bits of their log-probabilities; empty if none."""
    if found.token_ids != expected.token_ids:
        same = _num_same(found.token_ids, expected.token_ids)
        return f"only the first {same} of {len(expected.token_ids)} tokens are plain decoding's"
    pairs = zip(found.logprobs or (), expected.logprobs or (), strict=True)
    num_other = sum(a != b for a, b in pairs)
    return f"{num_other} log-probabilities have other bits" if num_other else ""


def _num_same(found: Sequence[int], expected: Sequence[int]) -> int:
    """Length of the common beginning."""
    differing = (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
    return next(differing, min(len(found), len(expected)))


# --- the command ------------------------------------------------------------------------------


def make_job(args: argparse.Namespace, device: Device, vocab_size: int) -> Job:
    """A prompt of random tokens; short where nothing is real."""
    if device.place.device != "cuda":
        prompt_len, num_tokens, repeats = 20, 12, 1
    else:
        prompt_len, num_tokens = args.prefix, 64 if args.quick else 128
        repeats = 1 if args.quick else 3
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocab_size, (prompt_len,), generator=generator).tolist()
    return Job(prompt, num_tokens, repeats)


def run(args: argparse.Namespace, device: Device) -> None:
    """Measure and report what the budget allows."""
    end = time.monotonic() + args.budget if args.budget else float("inf")
    vocab_size = SPECS[args.model].vocab_size if device.place.device == "cuda" else 500
    bench = Bench(device, args.model, make_job(args, device, vocab_size))
    measured: Callable[..., Measured] = functools.partial(one_case, bench=bench, end=end)
    run_bench("end_to_end_cuda", cases(args.quick), measured, args, device)


def main() -> None:
    """The command."""
    arguments = parser(__doc__)
    gpu.add_arguments(arguments, has_cpu_side=False)
    arguments.add_argument("--model", choices=list(SPECS), default="Llama-3-8B")
    arguments.add_argument("--prefix", type=int, default=2048, help="tokens of the prompt")
    args = start(arguments)
    run(args, gpu.chosen_device(args))


if __name__ == "__main__":
    main()
