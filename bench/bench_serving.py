"""What serving costs, and what it gives: streams over HTTP against the engine stepped by itself.

For each number of streams, and each way of speculation (``auto``: what the server does by itself,
``off``, ``on``: a fixed number of drafted tokens, ``--depth``), so many streams are open at any
time for ``--seconds``, over HTTP to ``specrt serve`` in its own process, and on an engine in this
one, in turn, ``--repeats`` times. Medians over repeats; ratios are of one repeat.

``to one``: throughput, over that of one stream (of the same way).
``p50``, ``p99``: ms between two events of a stream; ``p99/p50`` is of one repeat.
``cost %``: how much more time a token takes than stepped; ``cost cpu %``: how much more processor
time (of the server alone), which neighbours on the machine disturb less.
``loop %``: the server's event loop's processor time (HTTP, JSON, events), over all the rest of
the server's: its own cost a step, whatever else the machine does.
``client %``: the client's processor time, of one core's.
``auto/best``: throughput of ``auto`` over the better of ``on`` and ``off``, in the summary;
``auto/best cpu``: tokens by processor time, of the stepped engine.
``first``: ms to the first token of a ``--prompt`` tokens long prompt, of a server that rests, asked
for twice.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import specrt
from bench.harness import Row, parser, report, start
from bench.prompts import HELDOUT, load_prompts
from bench.served import Served
from bench.serving_load import (
    AUTO,
    OFF,
    ON,
    Load,
    first_token,
    make_jobs,
    over_http,
    stepped,
    window,
)
from specrt.engine.engine import Engine
from specrt.targets import BUILTIN

MODES = (AUTO, OFF, ON)
Pair = tuple[Load, Load]
"""Over HTTP, and stepped."""


def measured(
    args: argparse.Namespace, served: Served, engine: Engine
) -> dict[tuple[int, str], list[Pair]]:
    """All loads, in turn."""
    texts = load_prompts("heldout", HELDOUT, 64).texts
    prompts = [engine.encode(text) for text in texts]
    found: dict[tuple[int, str], list[Pair]] = {}
    for repeat in range(args.repeats):
        for streams in args.streams:
            for mode in args.modes:

                def jobs(seed: int = repeat) -> Any:
                    return make_jobs(prompts, tuple(args.lengths), seed)

                load = streams, mode, args.depth
                http = over_http(served, jobs(), *load, window(args.warm_up, args.seconds))
                alone = stepped(engine, jobs(), *load, window(args.warm_up, args.seconds))
                found.setdefault((streams, mode), []).append((http, alone))
                print(
                    f"{streams:3} {mode:5} {http.rate:7.1f} {alone.rate:7.1f} tokens/s", flush=True
                )
    return found


def rows_of(found: dict[tuple[int, str], list[Pair]]) -> list[Row]:
    """A line a load."""
    rows = []
    for (streams, mode), pairs in found.items():
        first = found.get((1, mode), [])
        rows.append(
            {
                "streams": streams,
                "speculation": mode,
                "tokens/s": statistics.median(http.rate for http, _ in pairs),
                "to one": _middle(
                    _over(http.rate, one.rate)
                    for (http, _), (one, _) in zip(pairs, first, strict=False)
                ),
                "p50": statistics.median(http.gap(0.5) for http, _ in pairs),
                "p99": statistics.median(http.gap(0.99) for http, _ in pairs),
                "p99/p50": statistics.median(http.gap(0.99) / http.gap(0.5) for http, _ in pairs),
                "stepped": statistics.median(alone.rate for _, alone in pairs),
                "stepped p99/p50": statistics.median(
                    alone.gap(0.99) / alone.gap(0.5) for _, alone in pairs
                ),
                "cost %": _percent(alone.rate / http.rate - 1 for http, alone in pairs),
                "cost cpu %": _percent(http.cpu_ms / alone.cpu_ms - 1 for http, alone in pairs),
                "loop %": 100
                * statistics.median(
                    http.loop_cpu / (http.cpu - http.loop_cpu) for http, _ in pairs
                ),
                "client %": 100
                * statistics.median(http.client_cpu / (http.end - http.begun) for http, _ in pairs),
            }
        )
    return rows


def _over(value: float, base: float) -> float:
    """Their ratio; NaN where a window was too short to see anything."""
    return value / base if base else math.nan


def _percent(shares: Iterable[float]) -> float:
    return 100 * statistics.median(shares)


def _middle(ratios: Iterable[float]) -> float | None:
    values = list(ratios)
    return statistics.median(values) if values else None


def auto_over_best(
    found: dict[tuple[int, str], list[Pair]], speed: Callable[[Pair], float]
) -> dict[str, float]:
    """By the number of streams: of one repeat each, then the median."""
    ratios: dict[str, float] = {}
    for streams in dict.fromkeys(streams for streams, _ in found):
        by_mode = [found.get((streams, mode)) for mode in MODES]
        if any(pairs is None for pairs in by_mode):
            continue
        auto, off, on = ([speed(pair) for pair in pairs or ()] for pairs in by_mode)
        ratios[str(streams)] = statistics.median(
            _over(a, max(b, c)) for a, b, c in zip(auto, off, on, strict=True)
        )
    return ratios


def repeated_prompt(served: Served, engine: Engine, length: int, count: int) -> dict[str, float]:
    """Milliseconds to the first token of prompts that were never seen, and of the same again."""
    rng, vocab_size = random.Random(7), engine.target.config.vocab_size
    times: list[tuple[float, float]] = []
    for _ in range(count + 1):
        ids = [rng.randrange(3, vocab_size) for _ in range(length)]
        body = {"prompt": ids, "max_tokens": 2, "temperature": 0, "stream": True}
        cold, warm = (asyncio.run(first_token(served.address, body)) for _ in range(2))
        times.append((cold, warm))
    del times[0]  # captures and first pages
    return {
        "first": 1e3 * statistics.median(cold for cold, _ in times),
        "again": 1e3 * statistics.median(warm for _, warm in times),
        "ratio": statistics.median(cold / warm for cold, warm in times),
    }


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    add = made.add_argument
    add("--target", default=BUILTIN)
    add("--drafter", default="fspad")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--streams", type=int, nargs="+", default=[1, 4, 16, 32])
    add("--modes", nargs="+", default=list(MODES), choices=MODES)
    add("--depth", type=int, default=4, help="drafted tokens of a round, where it is on")
    add("--seconds", type=float, default=6.0, help="of each window")
    add("--warm-up", type=float, default=2.0, help="seconds before it")
    add("--lengths", type=int, nargs=2, default=[64, 192], help="tokens of an answer")
    add("--prompt", type=int, default=1000, help="tokens of the prompt that comes again")
    add("--repeats", type=int, default=3)
    args = start(made)
    args.threads = args.threads or 2
    if args.quick:
        args.streams, args.repeats, args.prompt = args.streams[:2], 1, 200
        args.seconds, args.warm_up, args.lengths = min(args.seconds, 2.0), 0.5, [4, 8]
    return args


def main() -> None:
    args = _parse()
    options = ["--drafter", args.drafter, "--dtype", args.dtype]
    options += ["--max-batch", str(max(args.streams))]
    engine = specrt.load(
        args.target,
        args.drafter,
        dtype=args.dtype,
        progress=False,
        max_batch=max(args.streams),
    )
    with Served(args.target, options, threads=args.threads) as served:
        again = repeated_prompt(served, engine, args.prompt, 2 if args.quick else 7)
        found = measured(args, served, engine)
    summary = {
        "auto/best": auto_over_best(found, lambda pair: pair[0].rate),
        "auto/best cpu": auto_over_best(found, lambda pair: _over(1.0, pair[1].cpu_ms)),
        "first_ms": again,
        "goals": {"to one, 32": 3.0, "p99/p50": 4.0, "cost %": 10.0, "auto/best": 0.97,
                  "first ratio": 10.0},
    }  # fmt: skip
    report("serving", rows_of(found), save=args.save, summary=summary)


if __name__ == "__main__":
    main()
