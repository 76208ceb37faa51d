"""One GGUF file by us, plainly and with drafters, and by llama.cpp, in turn in one run.

A prompt of random tokens and so many more, whatever they are: llama.cpp rounds activations to 8
bits where weights are quantised, so texts part sooner or later (``agrees``: tokens before that).
``first_ms`` is the time to the first token: the prompt's pass and, of ours, a round. ``% triad``
counts the bytes of the matrices once a token, as ``bench_linear`` does once a pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch

from bench.contenders import (
    LLAMA_CPP,
    PLAIN,
    Contender,
    LlamaCpp,
    Output,
    Request,
    has_llama_cpp,
)
from bench.harness import Row, report
from bench.stream import Triad
from specrt import Engine, SamplingParams, load
from specrt.draft.base import DraftParams, EmptyDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.models.loader import Weights

DRAFTERS = "prompt-lookup,recycle"


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


@dataclass
class Race:
    """Contenders, and what they gave, repeat by repeat."""

    contenders: dict[str, Contender]
    vocab_size: int
    step_bytes: int
    """Of the matrices that our plain decoding reads for a token."""
    triad: Triad
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    streams: list[float] = field(default_factory=list)
    """The triad's bytes a second."""

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
                self.streams.append(self.triad.num_bytes / _fastest(self.triad.run))

    def rows(self) -> list[Row]:
        """A line for each contender."""
        return [self._row(name) for name in self.contenders]

    def _row(self, name: str) -> Row:
        outputs = self.outputs[name]
        rate = statistics.median(_rates(outputs))
        plain, peer = self.outputs[PLAIN], self.outputs.get(LLAMA_CPP)
        said = outputs[0].token_ids
        stream = statistics.median(self.streams)
        return {
            "contender": name,
            "tokens/s": rate,
            "vs plain": _speedup(_rates(outputs), _rates(plain)),
            "vs llama.cpp": peer and _speedup(_rates(outputs), _rates(peer)),
            "tau": sum(len(one.token_ids) for one in outputs)
            / sum(one.num_rounds for one in outputs),
            "first_ms": 1e3 * statistics.median(1 / one for one in _starts(name, outputs)),
            "first vs llama.cpp": peer
            and _speedup(_starts(name, outputs), _starts(LLAMA_CPP, peer)),
            "differs plain": sum(a != b for a, b in zip(said, plain[0].token_ids, strict=True)),
            "agrees": peer and _common(said, peer[0].token_ids),
            "% triad": 100 * self.step_bytes * rate / stream if name == PLAIN else None,
        }


def _fastest(fn: Callable[[], None]) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        fn()
        times.append(time.perf_counter() - started)
    return min(times)


def _rates(outputs: Sequence[Output]) -> list[float]:
    return [one.num_timed / one.seconds for one in outputs]


def _starts(name: str, outputs: Sequence[Output]) -> list[float]:
    """First tokens a second; llama.cpp's comes with the prompt's pass."""
    is_ours = name != LLAMA_CPP
    rounds = [one.seconds / one.num_rounds if is_ours else 0.0 for one in outputs]
    return [1 / (one.prefill_seconds + a) for one, a in zip(outputs, rounds, strict=True)]


def _speedup(rates: Sequence[float], baseline: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(rates, baseline, strict=True))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def step_bytes(weights: Weights) -> int:
    """Of the matrices that a step multiplies by."""
    layers = [m for one in weights.layers for m in (one.qkv, one.o, one.gate_up, one.down)]
    return sum(matrix.nbytes for matrix in [*layers, weights.lm_head])


def make_race(args: argparse.Namespace) -> Race:
    """All that were asked for and can be had, over one copy of our weights."""
    loaded = load(args.gguf, progress=False)
    model = loaded.target
    plain = Engine(model, EmptyDrafter(), loaded.tokenizer)
    contenders: dict[str, Contender] = {PLAIN: EngineOf(plain)}
    for name in [] if args.drafters == "none" else args.drafters.split(","):
        drafter = load_drafter(name, model, None, DrafterOptions())
        contenders[f"ours {name}"] = EngineOf(Engine(model, drafter, loaded.tokenizer))
    if LLAMA_CPP in args.peers and has_llama_cpp():
        context = args.prompt_tokens + args.max_new_tokens + 1
        threads = torch.get_num_threads()
        peer = LlamaCpp(args.gguf, "auto", threads=threads, context=context, stop_ids=[])
        contenders[LLAMA_CPP] = peer
    triad = Triad(1 << 20 if args.quick else None)
    return Race(contenders, model.config.vocab_size, step_bytes(model.weights), triad)


def run(args: argparse.Namespace) -> None:
    """Measure and report.

    Raises:
        SystemExit: a drafter changed the text.
    """
    race = make_race(args)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(race.vocab_size, (args.prompt_tokens,), generator=generator).tolist()
    race.run(Request(prompt, args.max_new_tokens, 0.0, 0), args.repeats)
    rows = race.rows()
    summary = {
        "file": Path(args.gguf).name,
        "prompt_tokens": args.prompt_tokens,
        "max_new_tokens": args.max_new_tokens,
        "weight_MB_per_step": race.step_bytes / 1e6,
        "triad_GB/s": statistics.median(race.streams) / 1e9,
    }
    report(f"generate_gguf_{args.gguf.stem}", rows, save=args.save, summary=summary)
    ours = [row for row in rows if row["contender"] != LLAMA_CPP]
    changed = [row["contender"] for row in ours if row["differs plain"]]
    if changed:
        raise SystemExit(f"not lossless: {', '.join(changed)}")
