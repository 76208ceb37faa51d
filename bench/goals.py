"""The figures that the CUDA kernels are to reach on an H200, and what a run gave."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
SMALL, ATTENTION = "small_kernels_cuda", "tree_attention_cuda"


@dataclass(frozen=True)
class Goal:
    """One figure of one row."""

    file: str
    where: Mapping[str, Any]
    column: str
    bound: float
    is_least: bool = False
    """Whether the bound is the least that will do; else the most."""

    def line(self, rows: Sequence[Row]) -> str | None:
        """What came of it; None if the row was not measured."""
        for row in rows:
            value = row.get(self.column)
            if value is not None and all(row.get(k) == v for k, v in self.where.items()):
                is_reached = value >= self.bound if self.is_least else value <= self.bound
                name = " ".join(str(part) for part in self.where.values())
                sign = ">=" if self.is_least else "<="
                verdict = "reached" if is_reached else "missed"
                return f"{name}: {self.column} {value:.3g}, goal {sign} {self.bound:g}: {verdict}"
        return None


def _attention(model: str, prefix: int) -> dict[str, Any]:
    return {"model": model, "batch": 1, "prefix": prefix, "nodes": 60}


def _all() -> Iterator[Goal]:
    bounds = {("Llama-3-8B", 2048): 6.0, ("Llama-3-8B", 8192): 17.0, ("Vicuna-7B", 2048): 11.0}
    for (model, prefix), most in bounds.items():
        where = _attention(model, prefix)
        yield Goal(ATTENTION, where, "us", most)
        yield Goal(ATTENTION, where, "flashinfer/ours", 1.5, is_least=True)
        yield Goal(ATTENTION, where, "sdpa/ours", 3.0, is_least=True)
    for op in ("rms_norm", "silu_mul", "kv_commit"):
        yield Goal(SMALL, {"op": op, "model": "Llama-3-8B", "rows": 60}, "us", 3.0)
    for op in ("rms_norm", "silu_mul"):
        where = {"op": op, "model": "Llama-3-8B", "rows": 8192}
        yield Goal(SMALL, where, "% of limit", 80.0, is_least=True)


GOALS = tuple(_all())


def lines(folder: Path, since: str) -> list[str]:
    """A line for each goal that the results in ``folder`` say something about.

    Args:
        folder: holds the benchmarks' JSON.
        since: ISO date and time; older results are another run's and are not looked at.
    """
    found = []
    rows = {file: _rows(folder / f"{file}.json", since) for file in (SMALL, ATTENTION)}
    for goal in GOALS:
        if line := goal.line(rows[goal.file]):
            found.append(line)
    return found


def _rows(path: Path, since: str) -> Sequence[Row]:
    if not path.exists():
        return ()
    result = json.loads(path.read_text())
    rows: Sequence[Row] = result["rows"] if result["environment"]["date"] >= since else ()
    return rows
