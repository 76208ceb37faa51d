"""``specrt replay``: rules for the draft length against each other, on recorded chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from specrt.cli.engine_options import RULES
from specrt.cli.options import INPUT, with_options
from specrt.cli.recording import RecordOptions, record_file
from specrt.cli.sampling_options import BriefSampling

if TYPE_CHECKING:
    from specrt.draft.length.control import ControlOptions
    from specrt.lab.replay import Replay
    from specrt.lab.trace import Trace


@with_options
def replay(
    *,
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
            metavar="NAME", help=f"{RULES}; repeatable; default: all.", rich_help_panel=INPUT
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
    recording: RecordOptions,
    sampling: BriefSampling,
) -> None:
    """Compare rules for the draft length on recorded chains: in seconds, without a model."""
    from specrt.cli import replay_plot, replay_report
    from specrt.draft.length.control import CONTROLLERS, parse_control
    from specrt.lab.replay import compare

    if plot is not None:
        replay_plot.check(plot)
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    chosen = {name: parse_control(name) for name in controller or CONTROLLERS[1:]}
    found = _traces(list(dict.fromkeys(traces or ())), chosen, recording, sampling)
    longest = next(iter(found.values())).header.models.max_draft
    result = compare(list(found.values()), _fitted(chosen, longest), draws)
    shown = _shown(result, controller)
    if plot is not None:
        replay_plot.save(plot, result, shown)
    show = replay_report.print_json if json else replay_report.print_tables
    show(result, shown, found)


def _traces(
    files: Sequence[str],
    chosen: Mapping[str, ControlOptions],
    recording: RecordOptions,
    sampling: BriefSampling,
) -> dict[str, Trace]:
    """What to replay, by file; recorded first where that is asked for, or there is none."""
    from specrt.lab.trace import read_traces

    place = recording.record
    if place is None and files:
        return dict(zip(files, read_traces(files), strict=True))
    # What would be refused behind the work is refused before it.
    _fitted(chosen, recording.max_draft)
    others = [file for file in files if file != place]
    read_traces(others)
    limits = sampling.params()
    if place is not None:
        record_file(place, recording, limits)
        return dict(zip([place, *others], read_traces([place, *others]), strict=True))
    with TemporaryDirectory() as folder:
        place = str(Path(folder) / "trace.jsonl")
        models = f"{recording.target} with {recording.drafter}"
        notice = f"no trace given: recording {models} into a temporary file"
        record_file(place, recording, limits, notice)
        return {"recorded now": read_traces([place])[0]}


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
