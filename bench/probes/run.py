"""One probe, one process: its rows, and why there are not all of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

Row = Mapping[str, Any]
_SHOWN_ERROR = 300
_LEAST = 1.0
"""Seconds without which a probe is not begun."""
_STOPPING = 5.0
"""Seconds that a stopped process may take to go; one that waits for its driver may never."""


@dataclass(frozen=True)
class Outcome:
    """What came of a probe."""

    rows: Sequence[Row]
    failure: str
    """Why it did not come to its end; empty if it did."""
    seconds: float


def run_probe(program: Sequence[str], name: str, seconds: float) -> Outcome:
    """Run ``program name`` for at most so many seconds; never raises.

    Whatever it prints: rows are the lines that are JSON objects of this probe.
    """
    if seconds < _LEAST:
        return Outcome((), "no time was left", 0.0)
    start = time.monotonic()
    # Files, not pipes: what was printed stays, and a process that cannot be stopped holds nothing.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            code = _exit_code([*program, name], seconds, out, err)
        except OSError as error:
            return Outcome((), f"does not start: {error}", 0.0)
        printed, complaint = _text(out), _text(err)
    took = time.monotonic() - start
    rows = parse_rows(printed, name)
    is_done = any(row.get("done") is True for row in rows)
    rows = [row for row in rows if "done" not in row]
    if code is None:
        failure = f"stopped after {seconds:.0f} s"
    elif code != 0:
        failure = _reason(code, complaint)
    else:
        failure = "" if is_done else "it ended without saying that it is done"
    return Outcome(rows, failure, took)


def parse_rows(printed: str, name: str) -> list[dict[str, Any]]:
    """Lines that are JSON objects and name the probe; others are none of its facts."""
    rows = []
    for line in printed.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("probe") == name:
            rows.append(row)
    return rows


def _exit_code(
    command: Sequence[str], seconds: float, out: IO[bytes], err: IO[bytes]
) -> int | None:
    """None if it had to be stopped."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process, and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOPPING)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _reason(code: int, complaint: str) -> str:
    """How it ended, and its last words."""
    how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
    lines = complaint.strip().splitlines()
    return f"{how}: {lines[-1][:_SHOWN_ERROR]}" if lines else how
