"""All cases of a benchmark on a GPU: what the budget allows, and a report whatever happens."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from bench import gpu
from bench.gpu import OURS
from bench.harness import Row, report
from bench.limits import Ceilings

Case = TypeVar("Case")
Measured = tuple[Row | None, dict[str, str]]
"""A row, and the contenders that have no figure in it with the reason."""


def run_bench(
    name: str,
    cases: Iterable[Case],
    one_case: Callable[[Case, Ceilings, int], Measured],
    args: argparse.Namespace,
) -> None:
    """Measure and report; leave with exit code 1 if a case failed, after the others.

    Args:
        name: of the results' file.
        cases: the ones that matter most first, since a budget may cut the rest.
        one_case: measures a case, given this device's ceilings and the bytes of its L2.
        args: ``budget`` in seconds or None, ``save``.
    """
    start = time.monotonic()
    facts = gpu.facts()
    ceilings = gpu.measure_ceilings()
    facts["busy"] = gpu.clocks()
    rows: list[Row] = []
    missing: dict[str, list[str]] = {}
    errors = []
    for case in cases:
        row, failures = None, {OURS: "over the budget"}
        if not rows or not args.budget or time.monotonic() - start < args.budget:
            try:
                row, failures = one_case(case, ceilings, facts["l2_bytes"])
            except torch.OutOfMemoryError:
                failures = {OURS: "out of memory"}
            except Exception as error:
                errors.append(f"{case}: {' '.join(str(error).split())}")
                failures = {OURS: gpu.reason(error)}
            torch.cuda.empty_cache()
        rows += [row] if row else []
        for contender, reason in failures.items():
            missing.setdefault(f"{contender}: {reason}", []).append(str(case))
    if rows:
        summary = {**vars(ceilings), "not_measured": gpu.counted(missing, len(rows))}
        report(name, rows, save=args.save, summary=summary, gpu=facts)
    if errors:
        raise SystemExit(f"{len(errors)} cases failed; the first: {errors[0][:400]}")
