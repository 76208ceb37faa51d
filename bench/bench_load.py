"""What loading a target takes: seconds, and the peak of resident memory against its weights.

Each load is a process of its own, which has imported everything first; the file's pages are read
once before, so they come from the page cache. ``peak MB`` is the process' whole peak, pages of the
mapped file among it; ``limit MB`` is 1.05 x the weights + 300 MB. ``first s`` is the first load of
a process; ``seconds`` the best of three after it, for which the system has the memory at hand: the
host of a virtual machine may take seconds to find gigabytes that the machine has not used of late.

    python -m bench.bench_load DIR FILE.gguf --repeats 3
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.harness import Row, parser, report, start
from bench.memory import import_all, status

_SHARE, _EXTRA = 1.05, 300e6
_PIECE = 16 << 20
_AGAIN = 3


def load_once(target: str, options: dict[str, Any]) -> dict[str, float]:
    """Load in this process; seconds and bytes."""
    import_all("ours")
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    first, weights = _timed(target, options)
    peak = status("VmHWM")
    seconds = min(_timed(target, options)[0] for _ in range(_AGAIN))
    return {
        "first": first, "seconds": seconds, "before": before, "peak": peak, "weights": weights,
    }  # fmt: skip


def _timed(target: str, options: dict[str, Any]) -> tuple[float, int]:
    """Seconds, and bytes of weights; nothing of it stays."""
    from specrt import load

    started = time.perf_counter()
    with load(target, progress=False, **options) as engine:
        seconds = time.perf_counter() - started
        size = engine.target.weights.arena.nbytes
    del engine
    gc.collect()
    return seconds, size


def row(target: str, options: dict[str, Any], repeats: int) -> Row:
    """A line: medians over processes.

    Raises:
        RuntimeError: a process failed.
    """
    command = [sys.executable, "-m", "bench.bench_load", "--child", json.dumps([target, options])]
    _read_all(Path(target))
    seen = []
    for _ in range(repeats):
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{target}: {done.stderr.strip()[-2000:]}")
        seen.append(json.loads(done.stdout.splitlines()[-1]))
    middle = {name: statistics.median(one[name] for one in seen) for name in seen[0]}
    limit = _SHARE * middle["weights"] + _EXTRA
    return {
        "target": Path(target).name,
        "options": " ".join(f"{name}={value}" for name, value in options.items()),
        "first s": middle["first"],
        "seconds": middle["seconds"],
        "weights MB": middle["weights"] / 1e6,
        "peak MB": middle["peak"] / 1e6,
        "limit MB": limit / 1e6,
        "peak/limit": middle["peak"] / limit,
        "growth/weights": (middle["peak"] - middle["before"]) / middle["weights"],
    }


def _read_all(target: Path) -> None:
    files = [target] if target.is_file() else [file for file in target.iterdir() if file.is_file()]
    for path in files:
        with path.open("rb") as file:
            while file.read(_PIECE):
                pass


def _parse() -> argparse.Namespace:
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("targets", nargs="*", metavar="TARGET", help="directories, files; default: the bundled one")
    add("--dtype", default="auto")
    add("--options", type=json.loads, default={}, help="JSON: others of specrt.load")
    add("--repeats", type=int, default=3)
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    return start(arguments)


def main() -> None:
    """Measure and report."""
    args = _parse()
    if args.child:
        print(json.dumps(load_once(*args.child)))
        return
    from specrt import builtin

    targets = [str(Path(one).resolve()) for one in args.targets or [builtin.target_path()]]
    options = {"dtype": args.dtype, **args.options}
    repeats = 1 if args.quick else args.repeats
    report("load", [row(target, options, repeats) for target in targets], save=args.save)


if __name__ == "__main__":
    main()
