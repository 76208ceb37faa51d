"""All cases of a benchmark on a GPU: what the budget allows, and a report whatever happens."""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from bench import gpu
from bench.gpu import OURS, Device
from bench.harness import Row, environment, report, result_of, save_result
from bench.limits import Ceilings

Case = TypeVar("Case")
Measured = tuple[Row | None, dict[str, str]]
"""A row, and the contenders that have no figure in it with the reason."""


class WrongResultError(Exception):
    """A case that was measured and gave something wrong: its row is kept, and says what."""

    def __init__(self, reason: str, row: Row) -> None:
        super().__init__(reason)
        self.row = row


def run_bench(
    name: str,
    cases: Iterable[Case],
    one_case: Callable[[Case, Device, Ceilings, int], Measured],
    args: argparse.Namespace,
    device: Device,
) -> None:
    """Measure and report; leave with exit code 1 if a case failed, after the others.

    The last line is the result, with what ``failed``. What there is, is saved after each case: the
    process may be stopped in the next.

    Args:
        name: of the results' file.
        cases: the ones that matter most first, since a budget may cut the rest.
        one_case: measures a case on the device, given its ceilings and the bytes of its L2.
        args: ``budget`` in seconds or None, ``save``.
        device: to measure on.
    """
    start = time.monotonic()
    try:
        facts, ceilings = device.facts(), device.ceilings()
        where = environment() | {"gpu": facts | {"busy": device.clocks()}, "blas": blas_facts()}
    except Exception as error:
        raise SystemExit(f"the device does not answer: {gpu.reason(error)}") from None
    rows: list[Row] = []
    missing: dict[str, list[str]] = {}
    errors: list[str] = []

    def summary() -> dict[str, Any]:
        return {**vars(ceilings), "not_measured": gpu.counted(missing, len(rows))}

    for case in cases:
        row, failures = None, {OURS: "over the budget"}
        if not rows or not args.budget or time.monotonic() - start < args.budget:
            measured = functools.partial(one_case, case, device, ceilings, facts["l2_bytes"])
            row, failures = _tried(measured, str(case), errors)
        rows += [row] if row else []
        for contender, reason in failures.items():
            missing.setdefault(f"{contender}: {reason}", []).append(str(case))
        if row and args.save:
            save_result(result_of(name, rows, summary(), where, errors), args.save)
    report(name, rows, save=args.save, summary=summary(), where=where, failed=errors)
    if errors:
        raise SystemExit(f"{len(errors)} cases failed; the first: {errors[0][:400]}")
    if not rows:
        raise SystemExit(f"nothing was measured: {'; '.join(missing)[:400]}")


def blas_facts() -> dict[str, str | bool | None]:
    """What torch's products, which ours are compared with, depend on."""
    settings, backend = torch.backends.cuda.matmul, torch.backends.cuda.preferred_blas_library()
    return {
        "library": str(backend).rpartition(".")[2],
        "reduced_precision": bool(settings.allow_bf16_reduced_precision_reduction),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def _tried(measured: Callable[[], Measured], case: str, errors: list[str]) -> Measured:
    """Notes an error instead of raising it."""
    try:
        return measured()
    except WrongResultError as error:
        errors.append(f"{case}: {error}")
        return error.row, {}
    except torch.OutOfMemoryError:
        return None, {OURS: "out of memory"}
    except Exception as error:
        errors.append(f"{case}: {' '.join(str(error).split())}")
        return None, {OURS: gpu.reason(error)}
