"""The figures that the CUDA kernels are to reach, and what a run gave.

They are stated for an H200. Times that follow from bytes are scaled to a GPU by the copy rate that
the same run has measured; times that follow from launching are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.limits import H200

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
    is_streaming: bool = False
    """Whether the bound is a time for bytes, so that a slower memory may take longer."""

    def line(self, rows: Sequence[Row], bytes_per_s: float) -> str | None:
        """What came of it on a GPU of that copy rate; None if the row was not measured."""
        for row in rows:
            value = row.get(self.column)
            if value is not None and all(row.get(k) == v for k, v in self.where.items()):
                return self._line(value, bytes_per_s)
        return None

    def _line(self, value: float, bytes_per_s: float) -> str:
        bound, stated = self.bound, ""
        if self.is_streaming:
            bound *= H200.bytes_per_s / bytes_per_s
            stated = f" ({self.bound:g} at an H200's {H200.bytes_per_s / 1e12:g} TB/s)"
        is_reached = value >= bound if self.is_least else value <= bound
        name = " ".join(str(part) for part in self.where.values())
        sign = ">=" if self.is_least else "<="
        verdict = "reached" if is_reached else "missed"
        return f"{name}: {self.column} {value:.3g}, goal {sign} {bound:.3g}{stated}: {verdict}"


def _attention(model: str, prefix: int) -> dict[str, Any]:
    return {"model": model, "batch": 1, "prefix": prefix, "nodes": 60}


def _all() -> Iterator[Goal]:
    bounds = {("Llama-3-8B", 2048): 6.0, ("Llama-3-8B", 8192): 17.0, ("Vicuna-7B", 2048): 11.0}
    for (model, prefix), most in bounds.items():
        where = _attention(model, prefix)
        yield Goal(ATTENTION, where, "us", most, is_streaming=True)
        yield Goal(ATTENTION, where, "flashinfer/ours", 1.5, is_least=True)
        yield Goal(ATTENTION, where, "sdpa/ours", 3.0, is_least=True)
    # A commit moves the accepted path, a handful of rows: 2 MB for 8 of them.
    of_trees = dict.fromkeys(("rms_norm", "silu_mul", "tree_settle", "history_append"), 60)
    for op, rows in {**of_trees, "kv_commit": 8}.items():
        yield Goal(SMALL, {"op": op, "model": "Llama-3-8B", "rows": rows}, "us", 3.0)
    # 1.3 times what reading the weights takes, which is 92 % of the copy rate.
    where = {"op": "feature_sample", "model": "Llama-3-8B", "rows": 10}
    yield Goal(SMALL, where, "% of limit", 70.8, is_least=True)
    of_rounds = ("tree_expand", 10, 8.0), ("tree_rerank", 60, 6.0), ("tree_accept", 60, 8.0)
    for op, rows, most in (*of_rounds, ("tree_accept_filtered", 60, 20.0)):
        yield Goal(SMALL, {"op": op, "model": "Llama-3-8B", "rows": rows}, "us", most)
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
    for file in (SMALL, ATTENTION):
        rows, bytes_per_s = _result(folder / f"{file}.json", since)
        for goal in GOALS:
            if goal.file == file and (line := goal.line(rows, bytes_per_s)):
                found.append(line)
    return found


def _result(path: Path, since: str) -> tuple[Sequence[Row], float]:
    """The rows, and the copy rate measured with them."""
    nothing: tuple[Sequence[Row], float] = ((), H200.bytes_per_s)
    if not path.exists():
        return nothing
    result = json.loads(path.read_text())
    if result["environment"]["date"] < since:
        return nothing
    return result["rows"], result["summary"].get("bytes_per_s", H200.bytes_per_s)
