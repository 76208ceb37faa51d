"""Which of several ways to do the same work wins, and the tables that winners are written into.

A table is the ``variants.h`` of a kernel. Its lines name a compute capability, sizes, the first of
which must be met exactly and the others not be exceeded, and two numbers: the choice.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import gpu
from bench.harness import Row

IN_USE, AGAIN = gpu.OURS, "ours again"
LEAST_GAIN = 0.02
"""Of the time in use: less is not worth a line."""
_BEGIN, _END = "    // BEGIN measured\n", "    // END measured\n"
_CSRC = Path(__file__).resolve().parents[1] / "csrc"


@dataclass(frozen=True)
class Tabled:
    """A kernel whose launches are planned by a table."""

    kernel: str
    """Its folder in csrc."""
    prefix: str
    """Of its results' names."""
    choices: Mapping[str, tuple[int, int]]
    """What a variant's name stands for in a line."""
    key_of: Callable[[Row], tuple[int, ...]]
    """The sizes that a line for a result's row names."""
    num_exact: int
    """How many of them must be met exactly."""

    @property
    def path(self) -> Path:
        return _CSRC / self.kernel / "variants.h"


@dataclass(frozen=True)
class Verdict:
    """Of one shape's measurements."""

    winner: str
    gain: float
    """The share of the time in use that the quickest saves; what wins is not told by it alone."""
    spread: float
    """Between the two measurements of the one in use, as a share."""

    @property
    def columns(self) -> Row:
        return {
            "winner": self.winner,
            "gain_%": 100 * self.gain,
            "spread_%": 100 * self.spread,
        }


def judged(seconds: Mapping[str, float]) -> Verdict:
    """Which variant is to be used.

    Args:
        seconds: by variant, ``IN_USE`` and ``AGAIN`` among them.
    """
    base = min(seconds[IN_USE], seconds[AGAIN])
    spread = abs(seconds[IN_USE] - seconds[AGAIN]) / base
    best = min(seconds, key=lambda name: seconds[name])
    gain = 1 - seconds[best] / base
    return Verdict(best if gain > max(2 * spread, LEAST_GAIN) else IN_USE, gain, spread)


# --- tables -----------------------------------------------------------------------------------


def table_lines(tabled: Tabled, result: Mapping[str, Any], table: str) -> list[str]:
    """The lines of a table for one GPU's result, narrow shapes before wide ones.

    Shapes at which the one in use won have a line, too, where a wider one would hold for them.

    Args:
        tabled: the kernel.
        result: of its variants.
        table: as it was when they were measured; what it says is the one in use.

    Raises:
        ValueError: a winner is no variant.
    """
    facts = result["environment"]["gpu"]
    arch = round(10 * float(facts["capability"]))
    origin = f"{facts['device']}, {result['environment']['date'][:10]}"
    chosen: dict[tuple[int, ...], tuple[int, int]] = {}
    for row in result["rows"]:
        key = tabled.key_of(row)
        chosen[key] = _choice(tabled, row["winner"]) or in_use(tabled, table, arch, key)
    exact = tabled.num_exact
    others = {key[:exact] for key, choice in chosen.items() if choice != (0, 0)}
    return [
        f"    {{{arch}, {', '.join(map(str, key))}, {{{choice[0]}, {choice[1]}}}}},  // {origin}\n"
        for key, choice in sorted(chosen.items())
        if key[:exact] in others
    ]


def _choice(tabled: Tabled, winner: str) -> tuple[int, int] | None:
    """The two numbers; None: the one in use."""
    if winner == IN_USE:
        return None
    if winner not in tabled.choices:
        raise ValueError(f"no variant: {winner!r}")
    return tabled.choices[winner]


def in_use(tabled: Tabled, table: str, arch: int, key: Sequence[int]) -> tuple[int, int]:
    """What a table says of a shape, as its ``measured_choice`` does; (0, 0): the rules."""
    exact = tabled.num_exact
    for line in re.findall(r"^    \{\d.*", table, re.MULTILINE):
        of_arch, *about, first, second = _numbers(line)
        is_near = of_arch == arch and about[:exact] == list(key[:exact])
        sizes = zip(key[exact:], about[exact:], strict=True) if is_near else ()
        if is_near and all(size <= most for size, most in sizes):
            return first, second
    return 0, 0


def with_lines(table: str, lines: Sequence[str]) -> str:
    """A table with these lines; others of the architecture stay for what they alone hold.

    So a run that was cut takes nothing from the shapes that it did not measure.
    """
    head, rest = table.split(_BEGIN)
    old, tail = rest.split(_END)
    measured = {_numbers(line)[:-2] for line in lines}
    kept = [line for line in old.splitlines(True) if _numbers(line)[:-2] not in measured]
    return "".join([head, _BEGIN, *sorted([*kept, *lines], key=_numbers), _END, tail])


def _numbers(line: str) -> tuple[int, ...]:
    """Of a line: architecture and sizes, then the choice."""
    words = re.findall(r"kAny|\d+", line.split("//")[0])
    return tuple(sys.maxsize if word == "kAny" else int(word) for word in words)


def record(path: Path, all_tabled: Sequence[Tabled]) -> None:
    """Put the winners of a result to use.

    Args:
        path: of the result.
        all_tabled: the kernels that it may be of.

    Raises:
        SystemExit: it is no result of a GPU, or of no such kernel.
    """
    try:
        result = json.loads(path.read_text())
        if result["environment"]["gpu"]["device"].startswith("no GPU"):
            raise SystemExit(f"{path}: a dry run, no figure is real")
        tabled = next(one for one in all_tabled if result["name"].startswith(one.prefix))
        table = tabled.path.read_text()
        lines = table_lines(tabled, result, table)
        arch = round(10 * float(result["environment"]["gpu"]["capability"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise SystemExit(f"{path}: no result of this benchmark: {error!r}") from None
    tabled.path.write_text(with_lines(table, lines))
    where = f"{tabled.kernel}/{tabled.path.name}"
    print(f"{where}: {len(lines)} lines for compute capability {arch / 10:g}")
