"""``specrt replay``: rules for the draft length against each other, on recorded chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from specrt.cli.options import (
    INPUT,
    RUNTIME,
    Dtype,
    Jsonl,
    MaxNewTokens,
    Seed,
    Target,
    Temperature,
    Threads,
)
from specrt.cli.recording import RecordOptions, record_file

if TYPE_CHECKING:
    from specrt.draft.length.control import ControlOptions
    from specrt.lab.replay import Replay

_RECORDING = "Recording"


def replay(
    traces: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TRACE]...",
            help="Recorded files; with none, the bundled drafter is recorded on a few problems.",
        ),
    ] = None,
    controller: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="fixed-K, threshold, adaptive-threshold, beta-ts, calibration-ts or cost-aware; "
            "repeatable; default: all.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            help="Replay those that draw so often, to see what is luck.", rich_help_panel=INPUT
        ),
    ] = 1,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A picture: .png or .svg.", rich_help_panel=INPUT),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object.", rich_help_panel=INPUT)
    ] = False,
    record: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Record into it first (gzipped if it ends in .gz), then replay it too.",
            rich_help_panel=_RECORDING,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file as for generate; default: problems the bundled model has not seen.",
            rich_help_panel=_RECORDING,
        ),
    ] = None,
    jsonl: Jsonl = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are user messages.", rich_help_panel=_RECORDING)
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(help="The prompts' name; default: the file's.", rich_help_panel=_RECORDING),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="The first so many.", rich_help_panel=_RECORDING)
    ] = None,
    max_draft: Annotated[
        int, typer.Option(help="Tokens drafted at each.", rich_help_panel=_RECORDING)
    ] = 8,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    target: Target = "builtin",
    drafter: Annotated[
        str, typer.Option(help="A bundled EESD drafter or a directory.", rich_help_panel=RUNTIME)
    ] = "eesd",
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Compare rules for the draft length on recorded chains: in seconds, without a model."""
    from specrt.cli import replay_plot, replay_report
    from specrt.draft.length.control import CONTROLLERS, parse_control
    from specrt.lab.replay import compare
    from specrt.lab.trace import read_traces
    from specrt.sampling import SamplingParams

    if plot is not None:
        replay_plot.check(plot)
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    chosen = {name: parse_control(name) for name in controller or CONTROLLERS[1:]}
    options = RecordOptions(
        target=target,
        drafter=drafter,
        prompts=prompts,
        is_jsonl=jsonl,
        is_chat=chat,
        task=task,
        num_prompts=num_prompts,
        max_draft=max_draft,
        dtype=dtype,
        threads=threads,
    )
    files = list(dict.fromkeys(traces or ()))
    is_temporary = record is None and not files
    with TemporaryDirectory() as folder:
        notice = None
        if is_temporary:
            notice = f"no trace given: recording {target} with {drafter} into a temporary file"
            record = str(Path(folder) / "trace.jsonl")
        if record is not None:
            # What would be refused behind the work is refused before it.
            _fitted(chosen, max_draft)
            read_traces([file for file in files if file != record])
            limits = SamplingParams(
                max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
            record_file(record, options, limits, notice)
            files = [record, *(file for file in files if file != record)]
        found = read_traces(files)
    result = compare(found, _fitted(chosen, found[0].header.models.max_draft), draws)
    shown = _shown(result, controller)
    if plot is not None:
        replay_plot.save(plot, result, shown)
    show = replay_report.print_json if json else replay_report.print_tables
    names = ["recorded now"] if is_temporary else files
    show(result, shown, dict(zip(names, found, strict=True)))


def _fitted(chosen: Mapping[str, ControlOptions], longest: int) -> dict[str, ControlOptions]:
    """The rules with room for what the traces hold.

    Raises:
        ValueError: a fixed length is more than that.
    """
    for name, options in chosen.items():
        if options.kind == "fixed" and options.draft_len > longest:
            raise ValueError(
                f"controller: expected at most the traces' fixed-{longest}, got {name}"
            )
    return {name: replace(options, max_draft=longest) for name, options in chosen.items()}


def _shown(result: Replay, asked: Sequence[str] | None) -> list[str]:
    """All, or those asked for and what they are measured by; in the order of the results."""
    from specrt.lab.replay import ALL_TASKS, PLAIN

    if not asked:
        return list(result.outcomes)
    yardsticks = {result.best_fixed(task) for task in result.tasks}
    wanted = {PLAIN, *asked, *yardsticks, result.best_fixed(ALL_TASKS)}
    return [name for name in result.outcomes if name in wanted]
