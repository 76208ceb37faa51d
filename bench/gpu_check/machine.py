"""What there is to work with: a Python, a GPU, tools."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_check.judge import last_line
from bench.gpu_check.stages import Machine
from bench.toolkit import find_tool

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ("torch", "pybind11", "setuptools", "rich")
"""Modules without which there is nothing to build or to measure with."""
FOR_TESTS = ("pytest", "pytest_timeout", "hypothesis", "transformers")
"""Modules without which less is tested."""
_ANSWER = 120.0
"""Seconds in which a GPU tells its facts; a driver that is not well may never."""


def choose_python(candidates: Sequence[str], lacks: Callable[[str], Sequence[str]]) -> str | None:
    """The first that lacks nothing, else the first that has what is required, else none.

    Args:
        candidates: interpreters, the preferred one first.
        lacks: the modules that one cannot import.
    """
    missing = {python: set(lacks(python)) for python in candidates}
    for allowed in (set(), set(FOR_TESTS)):
        for python in candidates:
            if missing[python] <= allowed:
                return python
    return None


def lacks(python: str, modules: Sequence[str] = (*REQUIRED, *FOR_TESTS)) -> list[str]:
    """Those of ``modules`` that an interpreter does not find; all if it does not run."""
    code = "import sys; from importlib.util import find_spec as f; "
    code += "print(*(m for m in sys.argv[1:] if f(m) is None))"
    try:
        done = subprocess.run(
            [python, "-c", code, *modules], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return list(modules)
    return done.stdout.split()


def find(python: str, *, is_dry: bool = False) -> Machine:
    """What there is to work with.

    Raises:
        SystemExit: a GPU is there, but torch cannot use it; the reason in a line.
    """
    absent = lacks(python, (*FOR_TESTS, "xdist", "flashinfer"))
    return Machine(
        python=python,
        gpu=_facts(python, is_dry),
        absent=[module for module in absent if module in FOR_TESTS],
        has_xdist="xdist" not in absent,
        has_flashinfer="flashinfer" not in absent and not is_dry,
        sanitizer=None if is_dry else find_tool("compute-sanitizer"),
        profiler=None if is_dry else find_tool("ncu"),
        is_dry=is_dry,
    )


def _facts(python: str, is_dry: bool) -> dict[str, Any]:
    command = [python, "-m", "bench.gpu", *(("--dry",) if is_dry else ())]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_ANSWER
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"gpu-check: no answer from the GPU in {_ANSWER:.0f} s") from None
    try:
        facts: dict[str, Any] = json.loads(last_line(done.stdout))
    except ValueError:
        reason = last_line(done.stderr)
        raise SystemExit(f"gpu-check: {python} -m bench.gpu failed: {reason}") from None
    if not facts and (seen := _listed_gpus()):
        raise SystemExit(f"gpu-check: torch of {python} sees no GPU, nvidia-smi sees {seen}")
    return facts


def _listed_gpus() -> str:
    """What nvidia-smi sees, in a line; empty where it is not or sees none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(line.split(" (UUID")[0] for line in done.stdout.splitlines() if "GPU" in line)
