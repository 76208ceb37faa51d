"""What ``specrt replay`` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from specrt.cli.bench_report import TAU

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from specrt.lab.replay import Replay
    from specrt.lab.trace import Trace

_REGRET = (
    "regret: modelled time lost against the best fixed length in hindsight (*), in milliseconds a "
    "token and as a share; negative: won; of several draws, mean and deviation"
)
_WIDTH = 100  # of a pipe or a file, which rich takes to be 80 wide
_COLUMNS = ("rounds", "tau", "drafted", "accepted", "ms/token", "speed-up", "regret")


def print_json(result: Replay, shown: Sequence[str], traces: Mapping[str, Trace]) -> None:
    """One object: the models, the files with their costs, and each task's controllers.

    Args:
        result: of the replay.
        shown: controllers, in order.
        traces: by their files' names.
    """
    headers = {file: trace.header for file, trace in traces.items()}
    files = [
        {
            "file": file,
            "num_sequences": len(traces[file].sequences),
            "temperature": header.temperature,
            "costs": asdict(header.costs),
        }
        for file, header in headers.items()
    ]
    models = next(iter(headers.values())).models
    print(json.dumps({"models": asdict(models), "traces": files, "tasks": result.as_dict(shown)}))


def print_tables(result: Replay, shown: Sequence[str], traces: Mapping[str, Trace]) -> None:
    """A table for each task, and one for all where there are several; as :func:`print_json`."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    for task in result.task_names():
        console.print(f"{task}, {result.num_tokens(task)} tokens", style="bold")
        console.print(_table(result, shown, task))
        console.print()
    models = next(iter(traces.values())).header.models
    console.print(
        f"{models.target} ({models.dtype}) with {models.drafter}, chains of {models.max_draft}; "
        "rounds are exact, times modelled from these:"
    )
    for file, trace in traces.items():
        parts = ", ".join(f"{name} {ms:.3f}" for name, ms in asdict(trace.header.costs).items())
        console.print(f"{file}: milliseconds {parts}", soft_wrap=True)
    console.print(TAU)
    console.print(_REGRET)


def _table(result: Replay, shown: Sequence[str], task: str) -> Table:
    num_draws = max(len(result.regret_draws(name, task)) for name in shown)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in (*_COLUMNS, f"{num_draws} draws" if num_draws > 1 else ""):
        table.add_column(column, justify="right")
    best = result.best_fixed(task)
    for name in shown:
        outcome = result.outcomes[name][task]
        table.add_row(
            f"{name} *" if name == best else name,
            str(outcome.num_rounds),
            f"{outcome.tau:.2f}",
            str(outcome.num_drafted),
            str(outcome.num_accepted),
            f"{outcome.ms_per_token:.4g}",
            f"{result.speedup(name, task):.2f}x",
            f"{result.regret_ms(name, task):+.3g}",
            _share(result.regret_draws(name, task)),
        )
    return table


def _share(draws: npt.NDArray[np.float64]) -> str:
    """The regret; mean and standard deviation where draws differ."""
    mean = f"{draws.mean():+.1%}"
    is_random = draws.min() < draws.max()
    return f"{mean} ±{100 * draws.std(ddof=1):.1f}" if is_random else mean
