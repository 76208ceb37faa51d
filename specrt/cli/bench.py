"""``specrt bench``: a drafter against plain decoding on a user's own target and prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from specrt.cli.errors import FAILED

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.engine.prompts import Prompt
    from specrt.lab.measure import Comparison, Summary
    from specrt.sampling import SamplingParams

TAU = "tau: mean of accept_length + 1 per round (accepted draft tokens and the target's own token)"


def run(
    engine: Engine,
    name: str,
    prompts: Sequence[Prompt],
    sampling: Sequence[SamplingParams],
    *,
    repeats: int,
    is_json: bool,
) -> None:
    """Measure and print.

    Raises:
        typer.Exit: with code 1 if the drafter's tokens were not plain decoding's.
    """
    from specrt.lab.measure import PLAIN, compare_all, without_drafter

    engines = {PLAIN: without_drafter(engine), name: engine}
    err = Console(stderr=True)

    def progress(done: int) -> None:
        if err.is_terminal:
            err.print(f"{done} of {len(prompts)} prompts", end="\r")

    summaries, comparisons = compare_all(
        engines, prompts, sampling, repeats=repeats, on_prompt=progress
    )
    if is_json:
        print(json.dumps(_as_dict(summaries, comparisons, name, repeats)))
    else:
        _print_table(summaries, comparisons, repeats)
    if summaries[name].num_equal_prompts < len(prompts):
        raise typer.Exit(FAILED)


def _as_dict(
    summaries: Mapping[str, Summary],
    comparisons: Sequence[Comparison],
    name: str,
    repeats: int,
) -> dict[str, Any]:
    import torch

    from specrt.cli.info import cpu_model

    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "summaries": [summary.as_dict() for summary in summaries.values()],
        "prompts": [
            {
                "num_tokens": one.measurements[name].num_tokens,
                "num_equal_tokens": one.num_equal(name),
                "tau": one.measurements[name].result.stats.tau,
                "speedup": one.speedup(name),
                "seconds": {key: m.seconds for key, m in one.measurements.items()},
            }
            for one in comparisons
        ],
    }


def _print_table(
    summaries: Mapping[str, Summary], comparisons: Sequence[Comparison], repeats: int
) -> None:
    import torch

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("", no_wrap=True)
    for column in ("tokens", "equal", "tau", "tokens/s", "speed-up", "by prompt"):
        table.add_column(column, justify="right")
    for summary in summaries.values():
        table.add_row(
            summary.name,
            str(summary.num_tokens),
            f"{summary.num_equal} of {summary.num_tokens}",
            f"{summary.tau:.2f}",
            f"{summary.tokens_per_second:.1f}",
            f"{summary.speedup:.2f}x",
            f"{min(summary.speedups):.2f}-{max(summary.speedups):.2f}x",
        )
    console, threads = Console(highlight=False), torch.get_num_threads()
    console.print(table)
    console.print(
        f"{len(comparisons)} prompts one at a time, median of {repeats}, "
        f"{threads} thread{'s' if threads > 1 else ''}; times include the prompt's own pass"
    )
    console.print(TAU)
