"""What ``specrt train`` prints at its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from specrt.train.loop.trainer import Outcome

_COLUMNS = ("exit", "draft step", "chain", "tau", "speed-up", "at T = 1", "calibration error")
_LEGEND = """\
The speed-up is an estimate, not a measurement: tau of the best chain over 1 + its
length x draft step. A draft step is its share of a plain one's weights, and verifying a
chain is taken to cost one plain step: near the truth for large models, too good for small
ones on a CPU. Measure with `specrt bench --drafter`. At T = 1: accepted where exit and
target draw with the same noise. Calibration error: of the confidence, greedy and at T = 1."""


def end(outcome: Outcome, out: Path, *, is_json: bool) -> None:
    """Print the summary; a run that a signal stopped ends with that signal's exit code."""
    if not outcome.is_done:
        typer.echo(f"stopped and saved in {out}; the same command goes on from there", err=True)
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)
    summary = outcome.summary
    if not summary:  # only the main process has one
        return
    if is_json:
        typer.echo(json.dumps(summary))
        return
    exits = summary.get("exits")
    for line in _head(summary, exits or [summary]):
        typer.echo(line)
    if exits is None:
        _print_drafter(summary, out)
    else:
        _print_exits(exits, out)


def _head(summary: dict[str, Any], drafters: Sequence[dict[str, Any]]) -> list[str]:
    num_parameters = sum(drafter["num_parameters"] for drafter in drafters)
    return [
        f"{summary['arch']}: {num_parameters / 1e6:.2f} M parameters, "
        f"{summary['num_steps']} steps, {summary['num_tokens']} tokens",
        f"{summary['tokens_per_second']:.0f} tokens/s, peak memory "
        f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB",
    ]


def _print_drafter(summary: dict[str, Any], out: Path) -> None:
    held_out = summary["held_out"]
    if held_out["num_sequences"]:
        typer.echo(
            f"held-out, teacher-forced chain: acceptance by depth {_rates(held_out)}, "
            f"expected tau {held_out['tau']:.2f} ({held_out['num_sequences']} sequences)"
        )
    typer.echo(f"drafter: {out}")


def _print_exits(exits: Sequence[dict[str, Any]], out: Path) -> None:
    """A table to choose N by."""
    if num_sequences := exits[0]["held_out"]["num_sequences"]:
        typer.echo(f"held-out, {num_sequences} sequences; acceptance of greedy chains by depth:")
        for one in exits:
            typer.echo(f"  exit {one['exit_layer']}: {_rates(one['held_out'])}")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in _COLUMNS:
            table.add_column(column, justify="right", no_wrap=True)
        for one in exits:
            table.add_row(*_cells(one))
        Console(highlight=False).print(table)
        typer.echo(_LEGEND)
    for one in exits:
        place = out if len(exits) == 1 else out / f"exit-{one['exit_layer']}"
        typer.echo(f"drafter: {place}")


def _cells(one: dict[str, Any]) -> list[str]:
    estimate, held_out = one["estimate"], one["held_out"]
    error = held_out["calibration_error"]
    return [
        str(one["exit_layer"]),
        f"{estimate['step_share']:.2f}",
        str(estimate["depth"]),
        f"{estimate['tau']:.2f}",
        f"{estimate['speedup']:.2f}x",
        f"{held_out['sampled_acceptance_rate']:.3f}",
        f"{error['greedy']:.3f}, {error['sampled']:.3f}",
    ]


def _rates(held_out: dict[str, Any]) -> str:
    return " ".join(f"{rate:.3f}" for rate in held_out["acceptance_rate"])
