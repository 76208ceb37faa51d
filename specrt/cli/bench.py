"""``specrt bench``: drafters against plain decoding on a user's own target and prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from specrt.cli.engine_options import drafter_name, target_directory
from specrt.cli.errors import FAILED

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.engine.prompts import Prompt
    from specrt.lab.measure import Comparison, Summary
    from specrt.sampling import SamplingParams

ALL = "all"
TAU = "tau: mean of accept_length + 1 per round (accepted draft tokens and the target's own token)"


def contenders(engine: Engine, target: str, drafters: str) -> dict[str, Engine]:
    """Engines of one target, by their drafters' names.

    Args:
        engine: of the target; its own drafter is left aside.
        target: as named on the command line.
        drafters: names and directories, with commas between; ``"all"``: those that need no
            checkpoint, and the bundled ones that were made for this target.

    Raises:
        CheckpointError: one of them is none, or was made for another target.
        ValueError: a name comes twice.
    """
    from specrt.draft.kind import DrafterOptions
    from specrt.draft.kinds import bundled_for, load_drafter, named_kinds
    from specrt.lab.measure import with_drafter

    path, _ = target_directory(target)
    names = drafters.split(",")
    if drafters == ALL:
        names = [*(kind.name for kind in named_kinds()), *bundled_for(engine.target.config)]
    engines: dict[str, Engine] = {}
    for name in map(str.strip, names):
        shown = drafter_name(name, engine.target.config)
        if shown in engines:
            raise ValueError(f"drafters: {shown} comes twice")
        drafter = load_drafter(name, engine.target, None, DrafterOptions(), path)
        engines[shown] = with_drafter(engine, drafter)
    return engines


def run(
    engines: Mapping[str, Engine],
    prompts: Sequence[Prompt],
    sampling: Sequence[SamplingParams],
    *,
    repeats: int,
    is_json: bool,
) -> None:
    """Measure and print.

    Args:
        engines: of one target, by name; plain decoding is added to them.
        prompts, sampling, repeats: as for :func:`specrt.lab.measure.compare_all`.
        is_json: one object in place of a table.

    Raises:
        typer.Exit: with code 1 if a drafter's tokens were not plain decoding's.
    """
    from specrt.lab.measure import PLAIN, compare_all, without_drafter

    engines = {PLAIN: without_drafter(next(iter(engines.values()))), **engines}
    err = Console(stderr=True)

    def progress(done: int) -> None:
        if err.is_terminal:
            err.print(f"{done} of {len(prompts)} prompts", end="\r")

    summaries, comparisons = compare_all(
        engines, prompts, sampling, repeats=repeats, on_prompt=progress
    )
    if is_json:
        print(json.dumps(_as_dict(summaries, comparisons, repeats)))
    else:
        _print_table(summaries, comparisons, repeats)
    if min(summary.num_equal_prompts for summary in summaries.values()) < len(prompts):
        raise typer.Exit(FAILED)


def _as_dict(
    summaries: Mapping[str, Summary],
    comparisons: Sequence[Comparison],
    repeats: int,
) -> dict[str, Any]:
    import torch

    from specrt.cli.info import cpu_model
    from specrt.lab.measure import PLAIN

    names = [name for name in summaries if name != PLAIN]
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "summaries": [summary.as_dict() for summary in summaries.values()],
        "prompts": [
            {
                "drafters": {name: _of_one(one, name) for name in names},
                "seconds": {key: m.seconds for key, m in one.measurements.items()},
            }
            for one in comparisons
        ],
    }


def _of_one(one: Comparison, name: str) -> dict[str, Any]:
    return {
        "num_tokens": one.measurements[name].num_tokens,
        "num_equal_tokens": one.num_equal(name),
        "tau": one.measurements[name].result.stats.tau,
        "speedup": one.speedup(name),
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
