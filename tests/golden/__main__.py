"""``python -m tests.golden FILE...``: run reference vectors of FSPAD or EAGLE-2 of any size."""

from __future__ import annotations

import sys

from specrt.types import CheckpointError
from tests.golden.check import TOLERANCE, check


def main(paths: list[str]) -> int:
    """Print a line for each file; 0 if all agree."""
    if not paths:
        print("usage: python -m tests.golden FILE...", file=sys.stderr)
        return 2
    is_good = True
    for path in paths:
        try:
            report = check(path)
        except (CheckpointError, KeyError, OSError, ValueError) as error:
            print(f"{path}: {error}")
            is_good = False
            continue
        is_good &= report.is_good
        errors = ", ".join(f"{name} {value:.1e}" for name, value in report.errors.items())
        trees = ", ".join(
            f"{name} {'equal' if same else 'DIFFERS'} ({size} nodes)"
            for name, (same, size) in report.trees.items()
        )
        verdict = "ok" if report.is_good else "FAILED"
        print(f"{path}: {verdict}: {report.arch}; relative error {errors} (limit {TOLERANCE:g})")
        print(f"  trees: {trees}")
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
