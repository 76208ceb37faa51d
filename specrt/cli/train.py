"""``specrt train``: one command for each kind of drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specrt.cli.engine_options import Lora, adapter_directory, set_threads, target_directory
from specrt.cli.errors import note
from specrt.cli.options import with_options
from specrt.cli.own_text import TEXTS_FILE, write_own_text
from specrt.cli.train_summary import end
from specrt.train.loop.options import DataOptions, EesdDataOptions, EesdOptions, FspadOptions

if TYPE_CHECKING:
    from specrt.train.run import TrainJob

app = typer.Typer(name="train", help="Train a drafter for a target.", no_args_is_help=True)

_MAX_TEXT = 256  # tokens of a text of the target's own


def _run(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Run")


@dataclass(frozen=True)
class PlaceOptions:
    """For what target, and where to put the drafter."""

    target: Annotated[
        str, typer.Option(help="A directory, a GGUF file, OWNER/NAME, 'builtin' or 'smollm2'.")
    ]
    out: Annotated[Path, typer.Option(help="The drafter's directory.")]
    lora: Lora = None


@dataclass(frozen=True)
class RunOptions:
    """What is no part of a recipe."""

    restart: Annotated[bool, _run("--restart", help="Forget what OUT holds.")] = False
    threads: Annotated[int | None, _run(help="Default: torch's.")] = None
    json: Annotated[bool, _run("--json", help="The summary as JSON.")] = False


@app.command()
@with_options
def fspad(
    *,
    place: PlaceOptions,
    data: Annotated[
        list[Path],
        typer.Option(help="JSONL or JSON with conversations; repeatable.", rich_help_panel="Data"),
    ],
    arch: Annotated[
        str,
        typer.Option(help="fspad, eagle2, or between them no-feature-sampling, no-split."),
    ] = "fspad",
    intermediate_size: Annotated[
        int | None, typer.Option(help="Width of its MLPs; default: the target's.")
    ] = None,
    draft_vocab: Annotated[
        int | None,
        typer.Option(help="Propose only so many tokens, the most frequent of the data or list."),
    ] = None,
    hot_tokens: Annotated[
        Path | None,
        typer.Option(help="In the data's place, a file of token ids, most frequent first."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="A drafter of the same shape to begin with: a directory or a bundled one."
        ),
    ] = None,
    reading: DataOptions,
    recipe: FspadOptions,
    run: RunOptions,
) -> None:
    """Train FSPAD, EAGLE-2 or one between them. The same command goes on after an interruption."""
    _require_accelerate()
    from specrt.train.run import train_fspad

    job = _job(place, data, reading, run)
    kept = _hot_tokens(job, draft_vocab, hot_tokens)
    outcome = train_fspad(
        job,
        recipe,
        arch=arch,
        intermediate_size=intermediate_size,
        hot_tokens=kept,
        draft_vocab=draft_vocab,
        initial=None if init is None else _initial(init, job),
    )
    end(outcome, place.out, is_json=run.json)


@app.command()
@with_options
def eesd(
    *,
    place: PlaceOptions,
    exit_layer: Annotated[
        list[int],
        typer.Option(help="Layers run before the exit; repeat it to compare several."),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSONL or JSON, best of `specrt distill-data`; repeatable. Default: text the "
            "target makes by itself first, in OUT/distilled.jsonl.",
            rich_help_panel="Data",
        ),
    ] = None,
    num_texts: Annotated[
        int, typer.Option(help="Without --data: texts to make.", rich_help_panel="Data")
    ] = 96,
    reading: EesdDataOptions,
    recipe: EesdOptions,
    run: RunOptions,
) -> None:
    """Train early exits of a target. The same command goes on after an interruption."""
    _require_accelerate()
    from specrt.train.run import train_eesd

    write_files = partial(
        write_own_text,
        place.target,
        place.out,
        num_texts=num_texts,
        max_new_tokens=min(reading.max_length - 1, _MAX_TEXT),
        seed=recipe.seed,
        lora=adapter_directory(place.lora),
        is_restart=run.restart,
    )
    if data:
        job = _job(place, data, reading, run)
    else:
        job = _job(place, [place.out / TEXTS_FILE], reading, run, write_files)
    end(train_eesd(job, recipe, exit_layer), place.out, is_json=run.json)


def _initial(init: str, job: TrainJob) -> Path:
    """Where the drafter to begin with lies; where it lay, of a run that goes on without it."""
    from specrt.config import ModelConfig
    from specrt.draft.kinds import drafter_directory
    from specrt.train.run import initial_of_run
    from specrt.types import CheckpointError

    try:
        return drafter_directory(init, ModelConfig.from_directory(job.target, adapter=job.adapter))
    except CheckpointError:
        if job.is_restart or initial_of_run(job.out) is None:
            raise
    note(f"{init} is not there; the run in {job.out} goes on without it")
    return Path(init)


def _hot_tokens(
    job: TrainJob, draft_vocab: int | None, file: Path | None
) -> Path | list[int] | None:
    """The list of tokens to propose: as given, or what the data say, most frequent first."""
    if file is not None or draft_vocab is None:
        return file
    from specrt.config import ModelConfig
    from specrt.train.data.token_counts import count_tokens

    vocab_size = ModelConfig.from_directory(job.target).vocab_size
    counts = count_tokens(job.files, job.target, vocab_size, skip_bad=job.data.skip_bad)
    order: list[int] = counts.ranking.sort(descending=True, stable=True).indices.tolist()
    return order


def _job(
    place: PlaceOptions,
    files: Sequence[Path],
    reading: DataOptions,
    run: RunOptions,
    write_files: Callable[[], None] | None = None,
) -> TrainJob:
    from specrt.train.run import TrainJob

    set_threads(run.threads)
    directory, name = target_directory(place.target)
    return TrainJob(
        target=directory,
        target_name=name,
        files=tuple(files),
        out=place.out,
        data=reading,
        write_files=write_files,
        is_restart=run.restart,
        adapter=adapter_directory(place.lora),
    )


def _require_accelerate() -> None:
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise ValueError("training needs accelerate: pip install 'specrt[train]'")
