"""Two threads against one, alone on the machine and beside processes that hold its cores.

64 one-row linears of 3 MB, launched as the engine launches them: each launch ends by all threads
meeting. Two threads should take at most 1.2 times what one takes, whatever else runs. ``--threads``
means nothing here.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from bench.harness import Row, measure_interleaved, parser, report, start
from specrt import ops
from specrt.ops.graph import CpuGraph

NUM_LINEARS, OUTPUTS, DEPTH = 64, 1536, 512
THREADS = (1, 2)


class Linears:
    """One row through every matrix, by us and by torch, on so many threads."""

    def __init__(self, count: int) -> None:
        self._weights = [torch.randn(OUTPUTS, DEPTH) for _ in range(count)]
        self._x, self._out = torch.randn(1, DEPTH), torch.empty(1, OUTPUTS)
        self._run = CpuGraph.capture(self._launch).launch

    def _launch(self) -> None:
        for weight in self._weights:
            ops.linear(self._x, weight, out=self._out)

    def ours(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._run()

    def torch(self, threads: int) -> None:
        torch.set_num_threads(threads)
        for weight in self._weights:
            F.linear(self._x, weight)


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """So many processes of our own priority that never sleep."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(num_processes)]
    try:
        time.sleep(0.5 if processes else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def bench(linears: Linears, num_busy: int, rounds: int) -> list[Row]:
    """One line for each number of threads; all of them and torch's are timed in turn."""
    contenders = {
        f"{name} {threads}": lambda run=run, threads=threads: run(threads)
        for name, run in (("ours", linears.ours), ("torch", linears.torch))
        for threads in THREADS
    }
    with busy(num_busy):
        seconds = measure_interleaved(contenders, min_time=0, rounds=rounds)
    return [row(seconds, num_busy, threads) for threads in THREADS]


def row(seconds: dict[str, float], num_busy: int, threads: int) -> Row:
    """Milliseconds, and the ratio to one thread's."""
    ours, torchs = seconds[f"ours {threads}"], seconds[f"torch {threads}"]
    return {
        "busy processes": num_busy,
        "threads": threads,
        "ms": 1e3 * ours,
        "ratio": ours / seconds[f"ours {THREADS[0]}"],
        "torch_ms": 1e3 * torchs,
        "torch_ratio": torchs / seconds[f"torch {THREADS[0]}"],
    }


def worst(rows: Sequence[Row]) -> float:
    """Two threads' time in those of one, where it is largest."""
    return max(float(line["ratio"]) for line in rows)


def main() -> None:
    """Measure and report."""
    args = start(parser(__doc__))
    linears = Linears(8 if args.quick else NUM_LINEARS)
    rounds = 3 if args.quick else 60
    rows = [line for num_busy in (0, 2) for line in bench(linears, num_busy, rounds)]
    report("threads", rows, save=args.save, summary={"worst_ratio": worst(rows)})


if __name__ == "__main__":
    main()
