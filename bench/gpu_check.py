"""``make gpu-check``: build, tests, sanitizers and benchmarks on a GPU, within a time budget.

Needs no network. Without a GPU it builds what this machine can and runs the shim tests. Exit code 1
if a stage failed or was cut. ``gpu_check.json`` is written after every command, beside the
benchmarks' own JSON; each command's output goes to a file, and its end is shown if it failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from bench import check_stages, goals
from bench.check_stages import BUDGET, CUT, FAILED, SKIPPED, STAGES, Command, Machine, Stage
from bench.commit import git_commit

ROOT = Path(__file__).resolve().parents[1]
_SHOWN_OUTPUT = 1500
_SHOWN_DETAIL = 110
_GRACE = 15.0
"""Seconds between the time a benchmark plans for and the time at which it is stopped."""


@dataclass
class Report:
    """The summary file, rewritten after each command so that an interruption leaves the rest."""

    path: Path
    head: Mapping[str, Any]
    commands: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    is_interrupted: bool = False

    def add(self, stage: str, command: str, verdict: tuple[str, str], seconds: float) -> None:
        status, detail = verdict
        row = {"stage": stage, "command": command, "status": status}
        self.commands.append(row | {"seconds": round(seconds, 1), "detail": detail})
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            **self.head,
            "seconds": round(time.monotonic() - self.started, 1),
            "interrupted": self.is_interrupted,
            "passed": self.has_passed,
            "commands": self.commands,
        }
        self.path.write_text(json.dumps(result, indent=2) + "\n")

    @property
    def has_passed(self) -> bool:
        bad = any(row["status"] in (FAILED, CUT) for row in self.commands)
        return not bad and not self.is_interrupted

    @property
    def outcome(self) -> str:
        """In a word."""
        if self.is_interrupted:
            return "INTERRUPTED"
        return "passed" if self.has_passed else "FAILED"

    def table(self) -> str:
        """Fixed columns, one line a command."""
        lines = [f"{'stage':10}{'command':16}{'status':9}{'seconds':>8}  detail"]
        for row in self.commands:
            detail = row["detail"][:_SHOWN_DETAIL]
            lines.append(
                f"{row['stage']:10}{row['command']:16}{row['status']:9}{row['seconds']:8.1f}"
                f"  {detail}"
            )
        return "\n".join(lines)


def run_stages(
    stages: Sequence[Stage], limits: check_stages.Limits, report: Report, logs: Path
) -> None:
    """Run each in turn, whatever became of the one before, while there is time."""
    end = time.monotonic() + limits.total
    for stage in stages:
        if stage.skipped:
            report.add(stage.name, "", (SKIPPED, stage.skipped), 0.0)
        stage_end = min(end, time.monotonic() + limits.stages[stage.name])
        for index, command in enumerate(stage.commands):
            # Time that one command leaves goes to the next.
            share = (stage_end - time.monotonic()) / (len(stage.commands) - index)
            if share < 1:
                report.add(stage.name, command.name, (CUT, "no time was left"), 0.0)
                continue
            start = time.monotonic()
            verdict = run_command(command, share, logs / f"{stage.name}-{command.name}.log")
            report.add(stage.name, command.name, verdict, time.monotonic() - start)


def run_command(command: Command, limit: float, log: Path) -> check_stages.Verdict:
    """Run it for at most ``limit`` seconds, with all its children; the output goes to ``log``."""
    budget = str(max(1, int(limit - _GRACE)))
    argv = [budget if part == BUDGET else part for part in command.argv]
    print(f"== {' '.join(argv)} (at most {limit:.0f} s)", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env={**os.environ, **command.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return FAILED, str(error)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(process)
    text = log.read_text(errors="replace")
    verdict = (CUT, f"stopped after {limit:.0f} s") if code is None else command.judge(code, text)
    if verdict[0] in (FAILED, CUT):
        print(text[-_SHOWN_OUTPUT:], flush=True)
        print(f"== {verdict[0]}: all of it is in {log}", flush=True)
    return verdict


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started, if any of it still runs."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue


# --- the machine ------------------------------------------------------------------------------


def lacks(
    python: str, modules: Sequence[str] = (*check_stages.REQUIRED, *check_stages.FOR_TESTS)
) -> list[str]:
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


def find_machine(python: str) -> Machine:
    """What there is to work with."""
    done = subprocess.run(
        [python, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    try:
        gpu = json.loads(check_stages.last_line(done.stdout))
    except ValueError:
        raise SystemExit(f"gpu-check: {python} -m bench.gpu failed:\n{done.stderr}") from None
    absent = lacks(python, (*check_stages.FOR_TESTS, "xdist", "flashinfer"))
    return Machine(
        python=python,
        gpu=gpu,
        absent=[module for module in absent if module in check_stages.FOR_TESTS],
        has_xdist="xdist" not in absent,
        has_flashinfer="flashinfer" not in absent,
        sanitizer=find_sanitizer(),
    )


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, else in the toolkit that nvcc belongs to."""
    if found := shutil.which("compute-sanitizer"):
        return found
    return next((str(path) for path in _toolkit_paths("compute-sanitizer") if path.is_file()), None)


def _toolkit_paths(tool: str) -> Iterator[Path]:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    homes.insert(0, str(Path(nvcc).resolve().parents[1]) if nvcc else None)
    for home in filter(None, homes):
        yield Path(home) / "bin" / tool
        yield Path(home) / "compute-sanitizer" / tool


# --- the command ------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default=",".join(STAGES), help="some of %(default)s")
    parser.add_argument("--essentials", action="store_true", help="in 4 minutes instead of 9")
    parser.add_argument("--list", action="store_true", help="the commands, not run")
    parser.add_argument("--save", type=Path, metavar="DIR", help="default: bench/results")
    parser.add_argument("--logs", type=Path, default=ROOT / "build/gpu_check", metavar="DIR")
    parser.add_argument(
        "--fits", action="store_true", help="only say by the exit code if this Python has it all"
    )
    return parser


def main() -> None:
    args = arguments().parse_args()
    if args.fits:
        raise SystemExit(bool(lacks(sys.executable)))
    try:
        names = check_stages.parse_stages(args.stages)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    machine = find_machine(_chosen_python())
    save = save_folder(args.save, machine)
    stages = check_stages.plan(machine, names, args.essentials, save)
    limits = check_stages.choose_limits(machine, args.essentials)
    print(f"python: {machine.python}")
    without = "torch sees none; building and running the shim tests"
    print(f"GPU: {machine.gpu.get('device', without)}")
    if args.list:
        _list(stages, limits)
        return
    check(stages, limits, Report(save / "gpu_check.json", _head(machine, args)), args.logs)


def check(
    stages: Sequence[Stage], limits: check_stages.Limits, report: Report, logs: Path
) -> NoReturn:
    """Run the stages, write the summary whatever happens, and leave with the exit code."""
    try:
        report.write()
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # now, not when there are results
        raise SystemExit(f"gpu-check: cannot write there (--save, --logs): {error}") from None
    for sign in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sign) != signal.SIG_IGN:  # of nohup
            signal.signal(sign, signal.default_int_handler)
    try:
        run_stages(stages, limits, report, logs)
    except KeyboardInterrupt:
        report.is_interrupted = True
    report.write()
    reached = goals.lines(report.path.parent, report.head["date"])
    for line in ["goals, stated for an H200:", *reached] if reached else []:
        print(line)
    print(report.table())
    print(f"what the commands printed: {logs}")
    print(f"gpu-check: {report.outcome}, {report.path}")
    raise SystemExit(0 if report.has_passed else 1)


def save_folder(asked: Path | None, machine: Machine) -> Path:
    """Where results go: those of a machine without a GPU are not kept in the repository."""
    kept = ROOT / "bench/results"
    return asked.resolve() if asked else kept if machine.gpu else kept / "local"


def _chosen_python() -> str:
    candidates = [sys.executable, str(ROOT / ".venv/bin/python")]
    chosen = check_stages.choose_python(candidates, lacks)
    if chosen is None:
        missing = lacks(candidates[0], check_stages.REQUIRED)
        raise SystemExit(f"gpu-check: {candidates[0]} lacks {', '.join(missing)}")
    return chosen


def _head(machine: Machine, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "essentials": args.essentials,
        "stages": args.stages,
        "gpu": machine.gpu or None,
    }


def _list(stages: Sequence[Stage], limits: check_stages.Limits) -> None:
    print(f"all: at most {limits.total:.0f} s")
    for stage in stages:
        print(f"{stage.name}: {stage.skipped or f'at most {limits.stages[stage.name]:.0f} s'}")
        for command in stage.commands:
            settings = [f"{name}={value!r}" for name, value in command.environment.items()]
            print("  " + " ".join([*settings, *command.argv]))


if __name__ == "__main__":
    main()
