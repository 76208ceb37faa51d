"""How the outcome of a command is judged: a status and a line of detail from its output.

Standard library only, as all of this package: it runs before anything is known about the Python
that runs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

OK, FAILED, CUT, SKIPPED, PARTIAL = "ok", "failed", "cut", "skipped", "partial"
READY = "the device runs torch"
"""``bench.one_of_each`` prints it before our first kernel: what fails earlier is not our fault."""

Verdict = tuple[str, str]
"""A status and a short line of detail."""
Judge = Callable[[int, str], Verdict]
"""Of an exit code and an output."""


def by_exit(code: int, output: str) -> Verdict:
    """By the exit code alone."""
    return (OK, "") if code == 0 else _failed(code, output)


def device(code: int, output: str) -> Verdict:
    """The facts of a GPU, shown."""
    facts = _json_object(output)
    if code != 0 or not facts:
        return _failed(code, output)
    shown = ("device", "driver", "sm_mhz", "memory_mhz", "temperature_c", "clocks")
    return OK, ", ".join(f"{name} {facts[name]}" for name in shown if name in facts)


def by_last_line(code: int, output: str) -> Verdict:
    """As :func:`by_exit`; success is told by the last line."""
    return (OK, last_line(output)) if code == 0 else _failed(code, output)


def demo(code: int, output: str) -> Verdict:
    """It must have said that all tokens were equal."""
    said = re.findall(r"^equal: (\d+) of (\d+) tokens$", output, re.MULTILINE)
    if code != 0 or not said or said[-1][0] != said[-1][1]:
        return _failed(code, output)
    return OK, f"equal: {said[-1][0]} of {said[-1][1]} tokens"


def tests(code: int, output: str) -> Verdict:
    """Tests must have passed: a run that skips all of them proves nothing."""
    # Not always the last line: libraries may complain when the process ends.
    summaries = [line for line in output.splitlines() if _PYTEST_SUMMARY.search(line)]
    summary = summaries[-1] if summaries else ""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", summary)}
    shown = ", ".join(f"{counts[word]} {word}" for word in _PYTEST_WORDS if word in counts)
    if code == 0 and counts.get("passed", 0) > 0:
        return OK, shown
    return FAILED, f"{exit_reason(code)}: {shown or last_line(output)}"


_PYTEST_SUMMARY = re.compile(r"\d+ (passed|failed|errors?|skipped|deselected)\b.* in [\d.:]+")
_PYTEST_WORDS = ("passed", "failed", "error", "errors", "skipped")


def collected(code: int, output: str) -> Verdict:
    """Tests that were found, not run."""
    found = re.search(r"(\d+)/\d+ tests collected|(\d+) tests? collected", output)
    if code != 0 or found is None:
        return _failed(code, output)
    return OK, f"{found[1] or found[2]} tests would run"


def without_tests(lack: str) -> Judge:
    """Less than the tests, and said so."""

    def judge(code: int, output: str) -> Verdict:
        if code == 0:
            return PARTIAL, f"{lack}: one of each kernel against torch, not the tests"
        return _failed(code, output)

    return judge


def sanitizer(code: int, output: str) -> Verdict:
    """Skipped where the tool cannot get so far as to run our first kernel."""
    if READY not in output:
        return SKIPPED, f"the tool does not work here: {last_line(output)}"
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    detail = summary[-1].strip("= ") if summary else last_line(output)
    return (OK if code == 0 else FAILED), detail


def contender(code: int, output: str) -> Verdict:
    """A baseline that does not compile here is left out of the benchmarks."""
    return (OK, "") if code == 0 else (SKIPPED, f"left out: {last_line(output)}")


def bench(code: int, output: str) -> Verdict:
    """The last line is the result; what it says of failed parts is told."""
    result = _json_object(output)
    if result is None or not isinstance(result.get("rows"), list):
        no_json = "no JSON in the last line: "
        return FAILED, f"{exit_reason(code)}: {no_json if code == 0 else ''}{last_line(output)}"
    failed = result.get("failed") or []
    detail = f"{len(result['rows'])} rows"
    if failed:
        detail += f"; failed: {'; '.join(map(str, failed))}"
    return (OK if code == 0 else FAILED), detail


def resources(code: int, output: str) -> Verdict:
    """Registers that went to memory do not stop anything, but are told."""
    result = _json_object(output)
    if result is None:
        return _failed(code, output)
    spills = result.get("spills") or []
    if spills:
        return FAILED, f"{len(spills)} kernels spill: {'; '.join(map(str, spills))}"
    return OK, f"{result.get('kernels')} kernels, none spills"


def exit_reason(code: int) -> str:
    """How a process ended, in words."""
    return f"exit code {code}" if code >= 0 else f"killed by signal {-code}"


def last_line(output: str) -> str:
    """The last that is not empty, in full."""
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def printable(text: str) -> str:
    """Without what would disturb a terminal: a dying process may print anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def _failed(code: int, output: str) -> Verdict:
    return FAILED, f"{exit_reason(code)}: {last_line(output)}"


def _json_object(output: str) -> dict[str, Any] | None:
    """Of the last line that begins like one; libraries may complain when the process ends."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    try:
        value = json.loads(lines[-1] if lines else "")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
