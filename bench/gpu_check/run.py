"""Runs a stage's commands, one after another or aside, each for at most its time."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_check.judge import CUT, FAILED, PARTIAL, SKIPPED, Verdict, printable
from bench.gpu_check.report import Report
from bench.gpu_check.stages import BUDGET, Command

ROOT = Path(__file__).resolve().parents[2]
_SHOWN_OUTPUT = 1500
_LEAST = 5.0
"""Seconds with which a command is still begun."""
_GRACE = 15.0
"""Seconds between the time a benchmark plans for and the time at which it is stopped."""


@dataclass(frozen=True)
class Running:
    """A command that was started."""

    command: Command
    process: subprocess.Popen[bytes]
    log: Path
    start: float
    limit: float
    """Seconds."""


def run_stage(commands: Sequence[Command], seconds: float, report: Report, logs: Path) -> None:
    """Run each in turn, whatever became of the one before, while there is time."""
    end = time.monotonic() + seconds
    asides: dict[str, Running] = {}
    try:
        for command in commands:
            if command.needs in asides:
                _finish(asides.pop(command.needs), report)
            limit = min(command.seconds, end - time.monotonic())
            if command.skipped:
                report.add(command.name, (SKIPPED, command.skipped), 0.0)
            elif limit < _LEAST:
                late = (PARTIAL if command.is_spare else CUT, "no time was left")
                report.add(command.name, late, 0.0)
            elif (running := _start(command, limit, report, logs)) and command.is_aside:
                asides[command.name] = running
            elif running:
                _finish(running, report)
        for running in asides.values():
            _finish(running, report)
    finally:
        for running in asides.values():
            stop(running.process)


def _start(command: Command, limit: float, report: Report, logs: Path) -> Running | None:
    """None if the program cannot be started, which is reported."""
    budget = str(max(1, int(limit - min(_GRACE, limit / 4))))
    argv = [budget if part == BUDGET else part for part in command.argv]
    beside = ", aside" if command.is_aside else ""
    print(f"== {' '.join(argv)} (at most {limit:.0f} s{beside})", flush=True)
    log = logs / f"{command.name.replace(' ', '_')}.log"
    start = time.monotonic()
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **command.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
    except OSError as error:
        report.add(command.name, (FAILED, str(error)), 0.0)
        return None
    report.begun.add(command.name)
    return Running(command, process, log, start, limit)


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In a new process: SIGTERM when gpu-check is killed, so that the GPU is free again."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _finish(running: Running, report: Report) -> None:
    """Wait for it, at most until its limit, and report."""
    code: int | None
    try:
        code = running.process.wait(max(0.0, running.start + running.limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        stop(running.process)  # what it has left running, too
    text = running.log.read_text(errors="replace")
    verdict = _verdict(running, code, text)
    if verdict[0] in (FAILED, CUT):
        print(printable(text[-_SHOWN_OUTPUT:]), flush=True)
        print(f"== {running.command.name}: {verdict[0]}; all of it is in {running.log}", flush=True)
    report.add(running.command.name, verdict, time.monotonic() - running.start)


def _verdict(running: Running, code: int | None, text: str) -> Verdict:
    if code is not None:
        return running.command.judge(code, text)
    status = PARTIAL if running.command.is_spare else CUT
    return status, f"stopped after {running.limit:.0f} s"


def stop(process: subprocess.Popen[bytes]) -> None:
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
