"""Thousands of requests to a server as a process, by clients that behave and clients that do not.

    python -m bench.serve_soak --requests 10000 --report soak.json

Whole answers, streams, clients that leave in the middle (by FIN, by RST, by SIGKILL of their
process), slow readers, halves of requests, malformed ones, several choices, structured output,
two keys: what is done follows from ``--seed``, when it happens from the machine. Every text that
comes, whole or cut, must be what plain decoding of the same seed says. After each ``--segment``
all clients rest; then nothing may run or wait at the server, and its memory, files, threads and
pages are written down. Memory is held against its median, the first quarter (warming up) left
out. The exit status says whether all held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.harness import environment
from bench.served import Served
from bench.serving_load import idle
from bench.soak_visits import Client, Visit, make_visits
from bench.soak_work import Work, make_works, plain_engine, with_answers
from specrt.targets import BUILTIN

KEYS = ("soak-key-one", "soak-key-two")
NAME = "soaked"
_FLAT = 0.02
_MOST_TOLD = 20
_LOOKS, _LOOK_SECONDS = 10, 0.05


@dataclass(frozen=True)
class Sample:
    """What the server holds when all clients rest."""

    num_requests: int
    resident_kb: int
    files: int
    threads: int
    running: float
    waiting: float
    held: float
    """Share of all pages that requests hold, which rest: 0 if none leaked."""
    shared: float
    """Pages kept for later prompts."""


@dataclass(frozen=True)
class Soak:
    """What came of it."""

    counts: dict[str, int]
    """Visits by kind."""
    problems: list[str]
    num_compared: int
    num_differing: int
    samples: list[Sample]
    seconds: float


async def soak(
    served: Served, works: Sequence[Work], visits: Sequence[Visit], clients: int, segment: int
) -> Soak:
    """Make all visits, so many at once."""
    client = Client(served.address, works, NAME)
    problems: list[str] = []
    samples: list[Sample] = []
    begun, left = time.monotonic(), deque(visits)

    async def serve_segment(todo: deque[Visit]) -> None:
        while todo:
            problem = await client.visit(todo.popleft())
            if problem is not None:
                problems.append(problem)

    while left:
        todo = deque(left.popleft() for _ in range(min(segment, len(left))))
        await asyncio.gather(*(serve_segment(todo) for _ in range(clients)))
        told, held = await idle(served.address, KEYS[0]), await rested(served)
        samples.append(sample_of(len(visits) - len(left), told, held))
        print(samples[-1], f"{len(problems)} problems", flush=True)
    return Soak(
        dict(Counter(visit.kind for visit in visits)),
        problems,
        client.num_compared,
        client.num_differing,
        samples,
        time.monotonic() - begun,
    )


async def rested(served: Served) -> Any:
    """What the server holds: of several looks that with the fewest files, for the connection that
    told the figures may still be closing."""
    looks = []
    for _ in range(_LOOKS):
        looks.append(served.held())
        await asyncio.sleep(_LOOK_SECONDS)
    return min(looks, key=lambda look: look.files)


def sample_of(num_requests: int, told: dict[str, float], held: Any) -> Sample:
    """A moment's figures, of the server's own and of /proc."""
    return Sample(
        num_requests,
        held.resident_kb,
        held.files,
        held.threads,
        told["num_requests_running"],
        told["num_requests_waiting"],
        told["kv_cache_usage_perc"],
        told["num_shared_pages"],
    )


def verdict(done: Soak) -> dict[str, bool]:
    """What must hold, and whether it did."""
    settled = done.samples[len(done.samples) // 4 :]
    memory = [sample.resident_kb for sample in settled]
    middle = statistics.median(memory)
    third = max(1, len(settled) // 3)
    first, last = settled[:third], settled[-third:]
    return {
        "no text differs": done.num_differing == 0,
        "no other problem": not [p for p in done.problems if not p.startswith("differs")],
        "all requests end": all(s.running == s.waiting == 0 for s in done.samples),
        "no page is leaked": all(sample.held == 0 for sample in done.samples),
        "no thread is leaked": _least(last, "threads") <= _least(first, "threads"),
        "no file is leaked": _least(last, "files") <= _least(first, "files"),
        "memory is flat": all(abs(kb / middle - 1) <= _FLAT for kb in memory),
    }


def _least(samples: Sequence[Sample], name: str) -> int:
    """What is never given back stays in the least of many samples; a connection that is just being
    closed does not."""
    return min(getattr(sample, name) for sample in samples)


def report_of(done: Soak, server: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What is kept."""
    return {
        "name": "serve_soak",
        "seed": args.seed,
        "environment": environment(),
        "server": server,
        "verdict": verdict(done),
        **asdict(done),
        "problems": done.problems[:_MOST_TOLD],
        "num_problems": len(done.problems),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole soak."""
    with plain_engine(args.target) as engine:
        works = with_answers(make_works(args.works, args.seed, is_short=args.short), engine)
    visits = make_visits(args.requests, works, KEYS, args.seed)
    keys = [option for key in KEYS for option in ("--api-key", key)]
    options = ["--drafter", args.drafter, "--dtype", "float32", "--served-model-name", NAME, *keys]
    with Served(args.target, [*options, *args.server_options], threads=args.threads) as served:
        done = asyncio.run(soak(served, works, visits, args.clients, args.segment))
        log = served.log()
        status = served.stop()
    server = {"options": [o for o in options if o not in KEYS], "exit": status, "log_end": log}
    return report_of(done, server, args)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--requests", type=int, default=10_000)
    add("--target", default=BUILTIN)
    add("--drafter", default="fspad")
    add("--clients", type=int, default=24, help="at once")
    add("--segment", type=int, default=250, help="requests between two rests")
    add("--works", type=int, default=500, help="different requests")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2, help="of the server")
    add("--short", action="store_true", help="answers of a few tokens")
    add("--report", type=Path, help="a file of JSON")
    add("server_options", nargs="*", help="further options of specrt serve, behind --")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    report = run(args)
    if args.report is not None:
        args.report.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{args.requests} requests in {report['seconds']:.0f} s: {report['counts']}")
    print(f"{report['num_compared']} texts compared, {report['num_differing']} differ")
    for problem in report["problems"]:
        print("problem:", problem[:400])
    for name, holds in report["verdict"].items():
        print(f"{'yes' if holds else 'NO ':4}{name}")
    if not all(report["verdict"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
