"""What ``ncu`` counts on the shapes of tree attention that are furthest from their limit.

Reads the variants' result of the same run; writes what ncu prints beside it, as text.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.harness import Row

NUM_SHAPES = 2
_SECONDS = 30.0


def furthest(rows: Sequence[Row], count: int = NUM_SHAPES) -> list[Row]:
    """Those with the least share of the limit, one a model and number of nodes."""
    found: dict[tuple[str, int], Row] = {}
    for row in sorted(rows, key=lambda row: row["% of limit"]):
        found.setdefault((row["model"], row["nodes"]), row)
    return list(found.values())[:count]


def case_name(row: Row) -> str:
    """As ``bench.variants --only`` knows it."""
    return "{model} batch {batch} prefix {prefix} nodes {nodes}".format(**row)


def ncu_command(ncu: str, case: str) -> list[str]:
    """Counters of one launch; clocks are left as they are."""
    counters = ["--set", "basic", "--clock-control", "none", "--launch-count", "1"]
    kernels = ["--kernel-name-base", "demangled", "--kernel-name", "regex:tree_attention"]
    launch = [sys.executable, "-m", "bench.variants", "--once", "--only", case]
    return [ncu, *counters, *kernels, *launch]


def profile(ncu: str, case: str, folder: Path) -> str:
    """Its file's name, or why there is none."""
    path = folder / f"profile_{re.sub(r'[^A-Za-z0-9]+', '_', case)}.txt"
    try:
        done = subprocess.run(
            ncu_command(ncu, case), capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"{case}: ncu took more than {_SECONDS:.0f} s"
    except OSError as error:
        return f"{case}: {error}"
    path.write_text(done.stdout + done.stderr)
    return path.name if done.returncode == 0 else f"{path.name}: ncu failed"


def results(folder: Path) -> Iterator[Row]:
    """Rows of all GPUs' variants there."""
    for path in sorted(folder.glob("variants_*.json")):
        yield from json.loads(path.read_text())["rows"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--ncu", required=True, metavar="PROGRAM")
    arguments.add_argument("--save", type=Path, required=True, metavar="DIR")
    args = arguments.parse_args()
    rows = list(results(args.save))
    if not rows:
        raise SystemExit(f"{args.save}: no variants_*.json, so no shape is known to be far off")
    lines = [profile(args.ncu, case_name(row), args.save) for row in furthest(rows)]
    print("; ".join(lines))


if __name__ == "__main__":
    main()
