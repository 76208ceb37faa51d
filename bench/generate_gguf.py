"""One GGUF file by us, plainly and with drafters, and by llama.cpp, in turn in one run.

A prompt of random tokens and so many more, whatever they are: llama.cpp rounds activations to 8
bits where weights are quantised, so texts part sooner or later (``agrees``: tokens before that).
``first_ms`` is the time to the first token: the prompt's pass and, of ours, a round. ``% triad``
counts the bytes of the matrices once a token, as ``bench_linear`` does once a pass.

``--forms`` has the file's weights run by us in other forms too, and ``--peers all`` by transformers
on what they are multiplied out (float32 and bfloat16), and by llama.cpp on that in bfloat16 where
it is one of the forms. Ratios are medians over pairs of one turn. On a machine that others use too,
``--cpu-time`` has one thread's CPU time in place of wall time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from bench.contenders import (
    LLAMA_CPP,
    PLAIN,
    TRANSFORMERS,
    Contender,
    LlamaCpp,
    Output,
    Request,
    Transformers,
    has_llama_cpp,
)
from bench.harness import Row, report
from bench.stream import Triad
from specrt import Engine, SamplingParams, load
from specrt.draft.base import DraftParams, EmptyDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.models.loader import Weights
from tools.export_checkpoint import export

DRAFTERS = "prompt-lookup,recycle"
FILE = "file"
_BFLOAT16 = "bfloat16"
FORMS: Mapping[str, Mapping[str, Any]] = {
    FILE: {},
    "int8": {"quantize": "int8"},
    _BFLOAT16: {"quantize": "none", "dtype": _BFLOAT16},
    "bfloat16-rounded": {"quantize": "none", "dtype": _BFLOAT16, "activations": _BFLOAT16},
    "float32": {"quantize": "none", "dtype": "float32"},
}
"""How :func:`specrt.load` takes the file; as it is, what is measured against."""
_FEW_TOKENS = 8
_NO_TOKEN = 1 << 30  # transformers warns of any below 0


ALONE = {"max_shared_tokens": 0}
"""Each run computes its prompt, as others' do."""


class EngineOf:
    """Our engine, past the ends of texts; ``draft`` is its trees' shape."""

    def __init__(self, engine: Engine, draft: DraftParams | None = None) -> None:
        self._engine, self._draft = engine, draft

    def run(self, request: Request) -> Output:
        """As :meth:`~bench.contenders.Contender.run`, but for the end of a sequence."""
        params = SamplingParams(max_new_tokens=request.max_new_tokens, ignore_eos=True)
        started = time.perf_counter()
        result = self._engine.generate(request.prompt_ids, params, self._draft)
        seconds = time.perf_counter() - started
        if result.error is not None:
            raise RuntimeError(result.error)
        prefill = result.stats.prefill_ms / 1e3
        count, rounds = len(result.token_ids), result.stats.num_rounds
        return Output(result.token_ids, count, seconds - prefill, prefill, rounds)


class CpuTimed:
    """A contender by the CPU time of its process: of so many tokens behind a few first ones.

    Neither the prompt's pass nor what else is done once a call is in it.
    """

    def __init__(self, contender: Contender) -> None:
        self._contender = contender

    def run(self, request: Request) -> Output:
        """As :meth:`~bench.contenders.Contender.run`; the tokens are more by the few."""
        num_tokens = request.max_new_tokens
        begun = time.process_time()
        few = self._contender.run(replace(request, max_new_tokens=_FEW_TOKENS))
        between = time.process_time()
        all_of = self._contender.run(replace(request, max_new_tokens=_FEW_TOKENS + num_tokens))
        first, whole = between - begun, time.process_time() - between
        seconds = whole - first
        prefill = max(0.0, first - seconds * few.num_rounds / max(1, all_of.num_rounds))
        return Output(all_of.token_ids, num_tokens, seconds, prefill, all_of.num_rounds)


@dataclass
class Race:
    """Contenders, and what they gave, repeat by repeat."""

    contenders: dict[str, Contender]
    vocab_size: int
    step_bytes: dict[str, int]
    """Of the matrices that plain decoding reads for a token, of ours."""
    triad: Triad | None
    """None: nothing is told of it, as beside CPU time, which it is not."""
    peers: tuple[str, ...] = (LLAMA_CPP,)
    """Of the contenders those that are not ours."""
    exact: tuple[str, ...] = ()
    """Those that are to say what our plain decoding says."""
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    streams: list[float] = field(default_factory=list)
    """The triad's bytes a second, time by time."""

    def run(self, request: Request, repeats: int) -> None:
        """All in turn, each time from another one on, behind short runs that are not counted."""
        for contender in self.contenders.values():
            contender.run(Request(request.prompt_ids, 8, 0.0, 0))
        names = list(self.contenders)
        self.outputs = {name: [] for name in names}
        for repeat in range(repeats):
            shift = repeat % len(names)
            for name in names[shift:] + names[:shift]:
                self.outputs[name].append(self.contenders[name].run(request))
                if self.triad is not None:
                    self.streams.append(self.triad.num_bytes / _fastest(self.triad.run))

    def rows(self) -> list[Row]:
        """A line for each contender."""
        return [self._row(name) for name in self.contenders]

    def _row(self, name: str) -> Row:
        outputs = self.outputs[name]
        rates = _rates(outputs)
        plain, peer = self.outputs[PLAIN], self.outputs.get(LLAMA_CPP)
        said, is_told = outputs[0].token_ids, name in self.exact
        size = self.step_bytes.get(name)
        num_tokens, num_rounds = sum(len(o.token_ids) for o in outputs), _num_rounds(outputs)
        row: Row = {
            "contender": name,
            "MB/token": size and size / 1e6,
            "ms/token": 1e3 * statistics.median(1 / rate for rate in rates),
            "tokens/s": statistics.median(rates),
            "vs plain": _speedup(rates, _rates(plain)),
        }
        for other in self.peers:
            row[f"vs {other}"] = _speedup(rates, _rates(self.outputs[other]))
        return row | {
            "tau": num_tokens / num_rounds,
            "first_ms": 1e3 * statistics.median(1 / one for one in self._starts(name)),
            "first vs llama.cpp": peer and _speedup(self._starts(name), self._starts(LLAMA_CPP)),
            "differs plain": _num_differing(said, plain[0].token_ids) if is_told else None,
            "agrees": peer and _common(said, peer[0].token_ids),
            "% triad": self.stream and size and 100 * size * row["tokens/s"] / self.stream,
        }

    @property
    def stream(self) -> float | None:
        """The triad's bytes a second."""
        return statistics.median(self.streams) if self.streams else None

    def _starts(self, name: str) -> list[float]:
        """First tokens a second; others' come with the prompt's pass."""
        is_ours = name not in self.peers
        outputs = self.outputs[name]
        rounds = [one.seconds / one.num_rounds if is_ours else 0.0 for one in outputs]
        return [1 / (one.prefill_seconds + a) for one, a in zip(outputs, rounds, strict=True)]


def _fastest(fn: Callable[[], None]) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        fn()
        times.append(time.perf_counter() - started)
    return min(times)


def _rates(outputs: Sequence[Output]) -> list[float]:
    return [one.num_timed / one.seconds for one in outputs]


def _num_rounds(outputs: Sequence[Output]) -> int:
    return sum(one.num_rounds for one in outputs)


def _num_differing(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def _speedup(rates: Sequence[float], baseline: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(rates, baseline, strict=True))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def step_bytes(weights: Weights) -> int:
    """Of the matrices that a step multiplies by."""
    layers = [m for one in weights.layers for m in (one.qkv, one.o, one.gate_up, one.down)]
    return sum(matrix.nbytes for matrix in [*layers, weights.lm_head])


def make_race(args: argparse.Namespace, scratch: Path) -> Race:
    """All that were asked for and can be had; drafters over one copy of our weights."""
    loaded = load(args.gguf, progress=False)
    model = loaded.target
    plain = Engine(model, EmptyDrafter(), loaded.tokenizer, **ALONE)
    contenders: dict[str, Contender] = {PLAIN: EngineOf(plain)}
    sizes = {PLAIN: step_bytes(model.weights)}
    for name in [] if args.drafters == "none" else args.drafters.split(","):
        drafter = load_drafter(name, model, None, DrafterOptions())
        contenders[f"ours {name}"] = EngineOf(Engine(model, drafter, loaded.tokenizer, **ALONE))
    exact = tuple(contenders)
    for form in args.forms:
        if form != FILE:
            engine = load(args.gguf, None, progress=False, **FORMS[form], **ALONE)
            contenders[f"ours {form}"] = EngineOf(engine)
            sizes[f"ours {form}"] = step_bytes(engine.target.weights)
    peers = _peers(args, scratch)
    contenders |= peers
    if args.cpu_time:
        contenders = {name: CpuTimed(one) for name, one in contenders.items()}
    triad = None if args.cpu_time else Triad(1 << 20 if args.quick else None)
    return Race(contenders, model.config.vocab_size, sizes, triad, tuple(peers), exact)


def _peers(args: argparse.Namespace, scratch: Path) -> dict[str, Contender]:
    """Other programs on the same weights."""
    peers: dict[str, Contender] = {}
    files = {LLAMA_CPP: args.gguf}
    if TRANSFORMERS in args.peers:
        for dtype in ("float32", _BFLOAT16):
            export(str(args.gguf), scratch / dtype, dtype)
            options = {"eos_token_id": _NO_TOKEN}
            peers[f"{TRANSFORMERS} {dtype}"] = Transformers(scratch / dtype, dtype, options=options)
    if _BFLOAT16 in args.forms and TRANSFORMERS in args.peers:
        from tools.make_gguf import make_gguf  # needs a package that only this needs

        files[f"{LLAMA_CPP} {_BFLOAT16}"] = scratch / "bfloat16.gguf"
        make_gguf(str(scratch / _BFLOAT16), scratch / "bfloat16.gguf", _BFLOAT16)
    if LLAMA_CPP in args.peers and has_llama_cpp():
        context = args.prompt_tokens + _FEW_TOKENS + args.max_new_tokens + 1
        threads = torch.get_num_threads()
        for name, file in files.items():
            peers[name] = LlamaCpp(file, "auto", threads=threads, context=context, stop_ids=[])
    return peers


def run(args: argparse.Namespace) -> None:
    """Measure and report.

    Raises:
        SystemExit: a drafter changed the text.
    """
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        race = make_race(args, Path(scratch))
        prompt = torch.randint(race.vocab_size, (args.prompt_tokens,), generator=generator).tolist()
        race.run(Request(prompt, args.max_new_tokens, 0.0, 0), args.repeats)
    rows = race.rows()
    summary = {
        "file": Path(args.gguf).name,
        "prompt_tokens": args.prompt_tokens,
        "max_new_tokens": args.max_new_tokens,
        "weight_MB_per_step": race.step_bytes[PLAIN] / 1e6,
        "triad_GB/s": race.stream and race.stream / 1e9,
        "time": "CPU" if args.cpu_time else "wall",
    }
    report(f"generate_gguf_{args.gguf.stem}", rows, save=args.save, summary=summary)
    changed = [row["contender"] for row in rows if row["differs plain"]]
    if changed:
        raise SystemExit(f"not lossless: {', '.join(changed)}")
