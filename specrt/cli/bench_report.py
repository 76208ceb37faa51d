"""What ``specrt bench`` says: tables on a terminal or in Markdown, or one JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from specrt.cli.bench_file import Result
    from specrt.lab.measure import Summary

TAU = "tau: mean of accept_length + 1 per round (accepted draft tokens and the target's own token)"
_MEAN, _ALL = "mean", "all"
_MOST_COLUMNS = 10
_PIPE_WIDTH = 200
# What Markdown would take for a cell's end or for markup; underscores in a word are none.
_MARKUP = re.compile(r"[\\`*<>\[\]|&~]|(?<![^\W_])_|_(?![^\W_])")

_FIGURES: Mapping[str, Callable[[Summary], tuple[float, str]]] = {
    "tau": lambda one: (one.tau, "{:.2f}"),
    "tokens/s": lambda one: (one.tokens_per_second, "{:.1f}"),
    "speed-up": lambda one: (one.speedup, "{:.2f}x"),
    "speed-up of decoding alone": lambda one: (one.decode_speedup, "{:.2f}x"),
}


@dataclass(frozen=True)
class Report:
    """Results, and how they came about."""

    results: Sequence[Result]
    names: Sequence[str]
    """Of the contenders."""
    repeats: int
    threads: int

    def __post_init__(self) -> None:
        assert self.results, "nothing was measured"

    def summaries(self, results: Sequence[Result]) -> dict[str, Summary]:
        """Sums over some results, by contender."""
        from specrt.lab.measure import sum_figures

        figures = [one.figures for one in results]
        return {name: sum_figures(name, figures) for name in self.names}

    def by_temperature(self) -> dict[float, list[Result]]:
        """The results of each, in the order they were asked for."""
        groups: dict[float, list[Result]] = {}
        for one in self.results:
            groups.setdefault(one.case.temperature, []).append(one)
        return groups

    def by_task(self, results: Sequence[Result]) -> dict[str, dict[str, Summary]]:
        """Sums by task and contender; none where prompts have no tasks."""
        groups: dict[str, list[Result]] = {}
        for one in results:
            groups.setdefault(one.case.task, []).append(one)
        return {task: self.summaries(found) for task, found in groups.items() if task}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sums over all prompts, over each task's, and prompt by prompt."""
        from specrt.cli.info import cpu_model

        runs = self.by_temperature()
        return {
            "cpu": cpu_model(),
            "threads": self.threads,
            "repeats": self.repeats,
            "summaries": [
                {"temperature": temperature, **summary.as_dict()}
                for temperature, results in runs.items()
                for summary in self.summaries(results).values()
            ],
            "tasks": [
                {"task": task, "temperature": temperature, **summary.as_dict()}
                for temperature, results in runs.items()
                for task, found in self.by_task(results).items()
                for summary in found.values()
            ],
            "prompts": [self._of_one(one) for one in self.results],
        }

    def _of_one(self, result: Result) -> dict[str, Any]:
        from specrt.lab.measure import PLAIN

        summaries = self.summaries([result])
        return {
            "prompt": result.case.name,
            "task": result.case.task or None,
            "temperature": result.case.temperature,
            "drafters": {
                name: {
                    "num_tokens": summary.num_tokens,
                    "num_equal_tokens": summary.num_equal,
                    "difference": _parting(result, name),
                    "tau": summary.tau,
                    "speedup": summary.speedup,
                    "decode_speedup": summary.decode_speedup,
                }
                for name, summary in summaries.items()
                if name != PLAIN
            },
            "seconds": {name: one.seconds for name, one in result.figures.items()},
            "prefill_seconds": {name: one.prefill_seconds for name, one in result.figures.items()},
        }

    def show(self, is_markdown: bool) -> None:
        """Print the tables: all prompts' sums, then figure by figure the tasks'."""
        console = Console(highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console = Console(highlight=False, markup=False, emoji=False, width=_PIPE_WIDTH)
        write = _write_markdown if is_markdown else _write_text
        runs = self.by_temperature()
        for temperature, results in runs.items():
            at = f"temperature {temperature:g}"
            write(console, at if len(runs) > 1 else "", self._totals(results))
            for figure, rows in self._tasks(results):
                write(console, f"{figure}, {at}", rows)
        num_prompts = max(map(len, runs.values()))
        times = f"median of {self.repeats}" if self.repeats > 1 else "one run of each"
        for line in (
            f"{num_prompts} prompts one at a time, {times}, {self.threads} "
            f"thread{'s' if self.threads > 1 else ''}; times include the prompt's own pass, but "
            "for decoding alone",
            TAU,
        ):
            console.print(f"\n{line}" if is_markdown else line, soft_wrap=True)

    def _totals(self, results: Sequence[Result]) -> list[list[str]]:
        head = ["", "tokens", "equal", "tau", "tokens/s", "speed-up", "by prompt", "decoding alone"]
        return [head] + [
            [
                shown(one.name),
                str(one.num_tokens),
                f"{one.num_equal} of {one.num_tokens}",
                f"{one.tau:.2f}",
                f"{one.tokens_per_second:.1f}",
                f"{one.speedup:.2f}x",
                f"{median(one.speedups):.2f}x ({min(one.speedups):.2f}-{max(one.speedups):.2f})",
                f"{one.decode_speedup:.2f}x",
            ]
            for one in self.summaries(results).values()
        ]

    def _tasks(self, results: Sequence[Result]) -> Iterator[tuple[str, list[list[str]]]]:
        """A table for each figure: a row a drafter; where tasks are many, a column a drafter."""
        tasks, whole = self.by_task(results), self.summaries(results)
        if not tasks:
            return
        for figure, value in _FIGURES.items():
            rows = [["", *(shown(task, (_MEAN, _ALL)) for task in tasks), _MEAN, _ALL]]
            for name in self.names:
                found = [value(one[name]) for one in tasks.values()]
                _, form = overall = value(whole[name])
                mean = (fmean(number for number, _ in found), form)
                cells = (f.format(number) for number, f in (*found, mean, overall))
                rows.append([shown(name), *cells])
            is_wide = len(rows[0]) > _MOST_COLUMNS
            yield figure, [list(row) for row in zip(*rows, strict=True)] if is_wide else rows


def shown(name: str, taken: Collection[str] = ()) -> str:
    """A name from a file or the command line as one line of a table: as it is, or as JSON where it
    would be read as something else. Different names stay different.

    Args:
        name: any text.
        taken: what the table calls its own rows.
    """
    is_plain = name.isprintable() and name == name.strip() and name[:1] not in ("", '"')
    return name if is_plain and name not in taken else json.dumps(name)


def _parting(result: Result, name: str) -> dict[str, Any] | None:
    difference = result.figures[name].difference
    return None if difference is None else asdict(difference)


def _write_text(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    if title:
        console.print(f"\n{title}", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(rows[0][0], no_wrap=True)
    for column in rows[0][1:]:
        table.add_column(column, justify="right")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def _write_markdown(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    if title:
        console.print(f"\n**{title}**\n")
    rule = ["---", *["--:"] * (len(rows[0]) - 1)]
    head, *body = [[_MARKUP.sub(r"\\\g<0>", cell) for cell in row] for row in rows]
    for row in (head, rule, *body):
        console.print(f"| {' | '.join(row)} |", soft_wrap=True)
