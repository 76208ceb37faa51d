"""What ``make gpu-check`` runs on which machine, and how the outcome of a command is judged.

Standard library only: it runs before anything is known about the Python that runs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = ("build", "tests", "sanitize", "bench")
BUDGET = "{budget}"
"""In a command: replaced by the seconds it should plan for."""
READY = "the device runs torch"
"""``bench.one_of_each`` prints it before our first kernel: what fails earlier is not our fault."""
OK, FAILED, CUT, SKIPPED, PARTIAL = "ok", "failed", "cut", "skipped", "partial"
REQUIRED = ("torch", "pybind11", "setuptools", "rich")
"""Modules without which there is nothing to build or to measure with."""
FOR_TESTS = ("pytest", "pytest_timeout", "hypothesis", "transformers")
"""Modules without which less is tested."""
_DEFAULT_ARCHS = ("80", "90a")  # CMakeLists.txt's

Verdict = tuple[str, str]
"""A status and a short line of detail."""
Judge = Callable[[int, str], Verdict]
"""Of an exit code and an output."""


@dataclass(frozen=True)
class Limits:
    """Seconds: for all, and for each stage."""

    total: float
    stages: Mapping[str, float]


FULL = Limits(520, {"build": 240, "tests": 150, "sanitize": 100, "bench": 200})
ESSENTIALS = Limits(225, {"build": 110, "tests": 70, "sanitize": 45, "bench": 60})
WITHOUT_GPU = Limits(1800, {"build": 900, "tests": 900, "sanitize": 0, "bench": 0})


@dataclass(frozen=True)
class Machine:
    """What was found."""

    python: str
    gpu: Mapping[str, Any]
    """``bench.gpu.facts``; empty without a GPU."""
    absent: Sequence[str]
    """Those of ``FOR_TESTS`` that this Python lacks."""
    has_xdist: bool
    has_flashinfer: bool
    sanitizer: str | None
    """Path of compute-sanitizer."""

    @property
    def arch(self) -> str:
        """The GPU's, as CMake spells it; sm_90 with its own instructions."""
        arch = str(self.gpu["capability"]).replace(".", "")
        return "90a" if arch == "90" else arch


@dataclass(frozen=True)
class Command:
    """One process of a stage."""

    name: str
    argv: Sequence[str]
    judge: Judge
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Commands that share a time limit, or the reason why there are none."""

    name: str
    commands: Sequence[Command] = ()
    skipped: str = ""


def choose_limits(machine: Machine, is_essential: bool) -> Limits:
    """The wall clock budget; without a GPU compilers and the shim take their time."""
    if not machine.gpu:
        return WITHOUT_GPU
    return ESSENTIALS if is_essential else FULL


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


def parse_stages(text: str) -> tuple[str, ...]:
    """``build,tests`` in the order of ``STAGES``.

    Raises:
        ValueError: a name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - set(STAGES))
    if unknown or not names:
        raise ValueError(f"--stages: expected some of {','.join(STAGES)}, got {text!r}")
    return tuple(name for name in STAGES if name in names)


def plan(machine: Machine, names: Sequence[str], is_essential: bool, save: Path) -> list[Stage]:
    """The stages called ``names``; benchmarks write their JSON into ``save``."""
    makers: dict[str, Callable[[], Stage]] = {
        "build": lambda: _build(machine, is_essential),
        "tests": lambda: _tests(machine),
        "sanitize": lambda: _sanitize(machine, is_essential),
        "bench": lambda: _bench(machine, is_essential, save),
    }
    return [makers[name]() for name in names]


def _build(machine: Machine, is_essential: bool) -> Stage:
    argv = (machine.python, "setup.py", "-q", "build_ext", "--inplace")
    environment = {"SPECRT_CUDA": "AUTO", "SPECRT_SIMT": "ON"}
    if machine.gpu:
        archs = dict.fromkeys((machine.arch, *(() if is_essential else _DEFAULT_ARCHS)))
        environment = {
            "SPECRT_CUDA": "ON",
            "SPECRT_SIMT": "OFF",
            "CMAKE_CUDA_ARCHITECTURES": ";".join(archs),
            # This machine's compilers may be newer than those that lint.
            "SPECRT_WERROR": "OFF",
        }
    return Stage("build", [Command("extension", argv, judge_exit, environment)])


def _tests(machine: Machine) -> Stage:
    if machine.absent:
        lack = f"this Python lacks {', '.join(machine.absent)}"
        if not machine.gpu:
            return Stage("tests", skipped=lack)
        argv: tuple[str, ...] = (machine.python, "-m", "bench.one_of_each")
        return Stage("tests", [Command("kernels", argv, judge_without_tests(lack))])
    pytest = (machine.python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if machine.has_xdist:
        pytest += ("-n", "4" if machine.gpu else "2", "--dist", "loadfile")
    if machine.gpu:
        argv = (*pytest, "-m", "gpu", "tests/ops", "tests/models", "tests/engine/test_bundled.py")
        return Stage("tests", [Command("gpu", argv, judge_pytest, environment)])
    return Stage(
        "tests",
        [
            Command("shim", (*pytest, "tests/simt"), judge_pytest, environment),
            Command("kernels", (*pytest, "-k", "simt", "tests/ops"), judge_pytest, environment),
        ],
    )


def _sanitize(machine: Machine, is_essential: bool) -> Stage:
    if not machine.gpu:
        return Stage("sanitize", skipped="no GPU")
    if machine.sanitizer is None:
        return Stage("sanitize", skipped="compute-sanitizer is neither on PATH nor beside nvcc")
    commands = []
    for tool in ("memcheck",) if is_essential else ("memcheck", "racecheck"):
        argv = (machine.sanitizer, "--tool", tool, "--error-exitcode", "9")
        argv += ("--kernel-name", "kns=specrt", machine.python, "-m", "bench.one_of_each")
        # Else a whole pool is one allocation, and what lies beyond a tensor is within bounds.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        commands.append(Command(tool, argv, judge_sanitizer, environment))
    return Stage("sanitize", commands)


def _bench(machine: Machine, is_essential: bool, save: Path) -> Stage:
    if not machine.gpu:
        return Stage("bench", skipped="no GPU")
    commands = []
    if machine.has_flashinfer and not is_essential:
        argv: tuple[str, ...] = (machine.python, "-m", "bench.flashinfer_contender")
        commands.append(Command("flashinfer", argv, judge_contender))
    for name in ("small_kernels", "tree_attention"):
        argv = (machine.python, "-m", f"bench.bench_{name}", "--device", "cuda")
        argv += ("--save", str(save), "--budget", BUDGET, *(("--quick",) if is_essential else ()))
        commands.append(Command(name, argv, judge_bench))
    return Stage("bench", commands)


# --- judging ----------------------------------------------------------------------------------


def judge_exit(code: int, output: str) -> Verdict:
    """By the exit code alone."""
    if code == 0:
        return OK, ""
    return FAILED, f"exit code {code}: {last_line(output)}"


def judge_pytest(code: int, output: str) -> Verdict:
    """Tests must have passed: a run that skips all of them proves nothing."""
    # Not always the last line: libraries may complain when the process ends.
    summaries = [line for line in output.splitlines() if _PYTEST_SUMMARY.search(line)]
    summary = summaries[-1] if summaries else ""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", summary)}
    shown = ", ".join(f"{counts[word]} {word}" for word in _PYTEST_WORDS if word in counts)
    if code == 0 and counts.get("passed", 0) > 0:
        return OK, shown
    return FAILED, f"exit code {code}: {shown or last_line(output)}"


_PYTEST_SUMMARY = re.compile(r"\d+ (passed|failed|errors?|skipped|deselected)\b.* in [\d.:]+")
_PYTEST_WORDS = ("passed", "failed", "error", "errors", "skipped")


def judge_without_tests(lack: str) -> Judge:
    """Less than the tests, and said so."""

    def judge(code: int, output: str) -> Verdict:
        if code == 0:
            return PARTIAL, f"{lack}: one of each kernel against torch, not the tests"
        return judge_exit(code, output)

    return judge


def judge_sanitizer(code: int, output: str) -> Verdict:
    """Skipped where the tool cannot get so far as to run our first kernel."""
    if READY not in output:
        return SKIPPED, f"the tool does not work here: {last_line(output)}"
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    detail = summary[-1].strip("= ") if summary else last_line(output)
    return (OK if code == 0 else FAILED), detail


def judge_contender(code: int, output: str) -> Verdict:
    """A baseline that does not compile here is left out of the benchmarks."""
    return (OK, "") if code == 0 else (SKIPPED, f"left out: {last_line(output)}")


def judge_bench(code: int, output: str) -> Verdict:
    """The last line is the result."""
    if code != 0:
        return judge_exit(code, output)
    try:
        rows = json.loads(last_line(output))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        return FAILED, f"no JSON in the last line: {error}"
    return OK, f"{len(rows)} rows"


def last_line(output: str) -> str:
    """The last that is not empty, in full."""
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"
