"""Timing shared by all benchmarks: interleaved contenders, a readable table, one JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.commit import command_line, git_commit

Row = dict[str, Any]
_SETTLE = 0.01  # seconds
_BATCHES_A_TURN = 3
RESULTS = Path(__file__).parent / "results"


def measure(
    fn: Callable[[], object], *, warmup: int = 3, min_time: float = 0.2, rounds: int = 20
) -> float:
    """Median seconds of one call of ``fn``; arguments as for :func:`measure_interleaved`."""
    return measure_interleaved({"": fn}, warmup=warmup, min_time=min_time, rounds=rounds)[""]


def measure_interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 3,
    min_time: float = 0.2,
    rounds: int = 20,
) -> dict[str, float]:
    """Median seconds of one call of each contender, timed in turn (A B A B ...).

    Interleaving makes a machine that slows down (heat, neighbours) slow all contenders alike. Fast
    calls are timed in batches of about 200 microseconds, so the clock's own cost does not show.
    A turn begins with a pause and an untimed call: the threads of the contender before (OpenMP's
    in torch, our pool's) spin for some milliseconds when their work is done, and would hold the
    cores that this one's threads need.

    Args:
        contenders: functions by name.
        warmup: untimed calls of each.
        min_time: seconds of timed work for each contender, at the least.
        rounds: timed batches of each, at the least.
    """
    repeats = {name: _repeats(fn, warmup) for name, fn in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    done = 0
    while done < rounds or min(spent.values()) < min_time:
        for name, fn in contenders.items():
            if len(contenders) > 1:
                time.sleep(_SETTLE)
                fn()
            for _ in range(_BATCHES_A_TURN):
                elapsed = _time(fn, repeats[name])
                samples[name].append(elapsed / repeats[name])
                spent[name] += elapsed
        done += _BATCHES_A_TURN
    return {name: statistics.median(times) for name, times in samples.items()}


def _time(fn: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    return time.perf_counter() - start


def _repeats(fn: Callable[[], object], warmup: int) -> int:
    """Calls in one timed batch, found while warming up."""
    for _ in range(warmup):
        fn()
    once = min(_time(fn, 1) for _ in range(3))
    return max(1, min(1000, round(200e-6 / max(once, 1e-9))))


def against_torch(
    ours: Callable[[], object], in_torch: Callable[[], object], **facts: object
) -> Row:
    """A row of one small op's time and that of the best torch expression for it."""
    times = measure_interleaved(
        {"specrt": ours, "torch": in_torch}, warmup=2, min_time=0.03, rounds=5
    )
    return {
        **facts,
        "specrt_us": times["specrt"] * 1e6,
        "torch_us": times["torch"] * 1e6,
        "ratio": ratio_to(times["torch"], times["specrt"]),
    }


def ratio_to(baseline: float, seconds: float) -> float:
    """How many times as fast as the baseline: above 1 is faster."""
    return baseline / seconds


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments every benchmark has; :func:`start` parses and applies them."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--threads", type=int, help="torch.set_num_threads; default: torch's")
    arguments.add_argument("--isa", choices=["avx2"], help="hold ours and torch to AVX2")
    arguments.add_argument("--quick", action="store_true", help="a smoke run of few seconds")
    arguments.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="DIR",
        help="write <name>.json there; default: bench/results",
    )
    return arguments


def start(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and apply ``--isa`` (by starting over) and ``--threads``."""
    args = arguments.parse_args()
    if args.isa:
        _restart_with_isa(args.isa)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def _restart_with_isa(isa: str) -> None:
    """Start this command over in an environment that limits us, ATen and oneDNN alike.

    All three read it once, when they are loaded, so it must be there before the process is.
    """
    limits = {
        "SPECRT_ISA": isa,
        "ATEN_CPU_CAPABILITY": isa,
        "ONEDNN_MAX_CPU_ISA": isa.upper(),
    }
    if any(os.environ.get(name) != value for name, value in limits.items()):
        os.environ.update(limits)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def environment() -> dict[str, Any]:
    """What the figures depend on: CPU and the parts of it used, versions, commit and date."""
    from specrt import _C

    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _cpu_field("flags").split() if _is_telling(flag)],
        "l3_cache": _l3_size(),
        "isa": _C.active_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git_commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def report(
    name: str,
    rows: Sequence[Row],
    *,
    save: Path | None = None,
    summary: Mapping[str, Any] | None = None,
    where: Mapping[str, Any] | None = None,
    failed: Sequence[str] | None = None,
) -> None:
    """Print the rows as a table, then as the last line one JSON object; save it on request.

    Args:
        name: the benchmark's name.
        rows: one dict a line; the keys of the first are the columns.
        save: a folder for ``<name>.json``, the ``--save`` of :func:`parser`.
        summary: figures beside the rows.
        where: it was measured, if known already; else :func:`environment`.
        failed: what could not be measured or was wrong, where that does not end the benchmark.
    """
    table = Table(title=name)
    columns = list(rows[0]) if rows else []
    for column in columns:
        is_number = any(isinstance(row.get(column), (int, float)) for row in rows)
        table.add_column(column, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    result = result_of(name, rows, summary or {}, where or environment(), failed)
    for key, value in result["summary"].items():
        print(f"{key}: {_shown(value)}")
    if save:
        save_result(result, save)
    print(json.dumps(result))


def result_of(
    name: str,
    rows: Sequence[Row],
    summary: Mapping[str, Any],
    where: Mapping[str, Any],
    failed: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What is kept of a benchmark; arguments as for :func:`report`."""
    result = {
        "name": name,
        "command": command_line(f"bench.{Path(sys.argv[0]).stem}", sys.argv[1:]),
        "environment": dict(where),
        "summary": dict(summary),
        "rows": list(rows),
    }
    return result if failed is None else result | {"failed": list(failed)}


def save_result(result: Mapping[str, Any], folder: Path) -> None:
    """Write ``<name>.json`` there, whole or not at all: the process may be stopped any time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}.json"
    new = path.with_suffix(".json.new")
    new.write_text(json.dumps(result, indent=2) + "\n")
    new.replace(path)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _is_telling(flag: str) -> bool:
    """Whether a CPU flag says which matrix kernels can run."""
    return flag in ("avx2", "fma", "f16c", "asimd", "sve") or flag.startswith(
        ("avx512", "avx_vnni", "amx", "bf16")
    )


def _cpu_field(name: str) -> str:
    """A line of Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":", 1)[0].strip() == name:
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""


def l3_bytes() -> int:
    """Of the last cache; 0 where the system does not say."""
    digits = (_l3_size() or "").removesuffix("K")
    return 1024 * int(digits) if digits.isdecimal() else 0


def _l3_size() -> str | None:
    """Weights that fit in it are not streamed from memory."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return None
