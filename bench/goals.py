"""The figures that the CUDA kernels are to reach, and what a run gave.

They are stated for an H200. Times that follow from bytes are scaled to a GPU by the copy rate that
the same run has measured; times that follow from launching are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.limits import H200

Row = Mapping[str, Any]
SMALL, ATTENTION = "small_kernels_cuda", "tree_attention_cuda"
LINEAR, ROUND, PREFILL = "linear_cuda", "round_cuda", "prefill_cuda"
TRAIN, TRAINED = "train_cuda", "trained_speed"
FSPAD = "round_cuda_fspad"
LARGE_MB = 50
"""A matrix that is read long enough for the memory's rate to show."""


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
    among: Callable[[Row], bool] | None = None
    """If given, all rows of which this holds besides are meant, and the worst is told."""

    def line(self, rows: Sequence[Row], bytes_per_s: float) -> str | None:
        """What came of it on a GPU of that copy rate; None if no such row was measured."""
        found = [row for row in rows if row.get(self.column) is not None and self._is_meant(row)]
        if not found:
            return None
        if self.among is None:
            return self._line(found[0][self.column], bytes_per_s)
        worst = (min if self.is_least else max)(found, key=lambda row: float(row[self.column]))
        named = " ".join(str(worst[name]) for name in ("model", "matrix") if name in worst)
        line = self._line(worst[self.column], bytes_per_s)
        return f"{line} (worst of {len(found)}: {named})"

    def _is_meant(self, row: Row) -> bool:
        is_there = all(row.get(name) == value for name, value in self.where.items())
        return is_there and (self.among is None or self.among(row))

    def _line(self, value: float, bytes_per_s: float) -> str:
        bound, stated = self.bound, ""
        if self.is_streaming:
            bound *= H200.bytes_per_s / bytes_per_s
            stated = f" ({self.bound:g} at an H200's {H200.bytes_per_s / 1e12:g} TB/s)"
        is_reached = value >= bound if self.is_least else value <= bound
        name = " ".join(str(part) for part in self.where.values()) or "all"
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
    of_trees = dict.fromkeys(("rms_norm", "activate", "tree_settle", "history_append"), 60)
    for op, rows in {**of_trees, "kv_commit": 8}.items():
        yield Goal(SMALL, {"op": op, "model": "Llama-3-8B", "rows": rows}, "us", 3.0)
    # 1.1 times what reading the weights takes, which is 92 % of the copy rate.
    for op in ("feature_sample", "feature_sample_folded"):
        where = {"op": op, "model": "Llama-3-8B", "rows": 10}
        yield Goal(SMALL, where, "% of limit", 83.6, is_least=True)
    of_rounds = ("tree_expand", 10, 8.0), ("tree_rerank", 60, 6.0), ("tree_accept", 60, 8.0)
    for op, rows, most in (*of_rounds, ("tree_accept_filtered", 60, 20.0)):
        yield Goal(SMALL, {"op": op, "model": "Llama-3-8B", "rows": rows}, "us", most)
    where = {"op": "tree_expand_by_maxima", "model": "Vicuna-7B", "rows": 10}  # of 32,000 tokens
    yield Goal(SMALL, where, "us", 5.0)
    for op in ("rms_norm", "activate"):
        where = {"op": op, "model": "Llama-3-8B", "rows": 8192}
        yield Goal(SMALL, where, "% of limit", 80.0, is_least=True)


def _of_linear() -> Iterator[Goal]:
    """Each the worst of thirteen matrices, at a number of rows."""

    def is_matrix(row: Row) -> bool:
        return bool(row["matrix"] != "layer")

    def is_large(row: Row) -> bool:
        return bool(is_matrix(row) and row["MB"] >= LARGE_MB)

    for rows in (1, 8, 16, 32, 60, 64):
        where = {"rows": rows}
        yield Goal(LINEAR, where, "% of copy", 88.0, is_least=True, among=is_large)
    for rows in (1, 8, 16, 32, 60, 64, 128, 512, 2048):
        where = {"rows": rows}
        yield Goal(LINEAR, where, "cublas/ours", 1.0, is_least=True, among=is_matrix)
    for model in ("Llama-3-8B", "Vicuna-7B", "Llama-3-70B/4"):
        where = {"model": model, "matrix": "layer", "rows": 60}
        yield Goal(LINEAR, where, "x one row", 1.05)


def _of_rounds() -> Iterator[Goal]:
    where = {"model": "Llama-3-8B", "contender": "plain"}
    yield Goal(ROUND, where, "ms a token", 4.0, is_streaming=True)
    yield Goal(ROUND, where, "host gap %", 2.0)
    yield Goal(ROUND, {}, "price %", 5.0, among=lambda row: True)
    yield Goal(PREFILL, {"contender": "ours", "rows": 512}, "x transformers", 2.5)


def _of_training() -> Iterator[Goal]:
    yield Goal(
        TRAIN, {"kind": "fspad"}, "% of products", 50.0, is_least=True, among=lambda row: True
    )
    for drafter in ("fspad", "eesd"):
        yield Goal(TRAINED, {"contender": drafter}, "x plain", 2.0, is_least=True)
        yield Goal(TRAINED, {"contender": drafter}, "x transformers", 4.0, is_least=True)


def _of_drafts() -> Iterator[Goal]:
    """Of trees of 60 nodes, six levels, a reduced draft vocabulary and folded tables."""
    where = {"drafter": "fspad, head of 32,000, folded"}
    for most, named in ((5.8, where), (5.1, {"drafter": f"{where['drafter']}, fp8"})):
        yield Goal(FSPAD, named, "ms a round", most, is_streaming=True)
        yield Goal(FSPAD, named, "x plain round", 1.5)
        yield Goal(FSPAD, named, "draft x streaming", 1.1)
        yield Goal(FSPAD, named, "host gap %", 2.0)


GOALS = (*_all(), *_of_linear(), *_of_rounds(), *_of_drafts(), *_of_training())


def lines(folder: Path, since: str) -> list[str]:
    """A line for each goal that the results in ``folder`` say something about.

    Args:
        folder: holds the benchmarks' JSON.
        since: ISO date and time; older results are another run's and are not looked at.
    """
    found = []
    for file in (SMALL, ATTENTION, LINEAR, ROUND, PREFILL, FSPAD, TRAIN, TRAINED):
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
