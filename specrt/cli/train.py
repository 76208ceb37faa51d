"""``specrt train``: one command for each kind of drafter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specrt.cli import train_options as given
from specrt.cli.train_options import DATA, RECIPE
from specrt.cli.train_summary import end

app = typer.Typer(name="train", help="Train a drafter for a target.", no_args_is_help=True)

_MAX_TEXT = 256  # tokens of a text of the target's own


@app.command()
def fspad(
    target: given.Target,
    data: given.DataFiles,
    out: given.Out,
    arch: Annotated[
        str,
        typer.Option(help="fspad, eagle2, or between them no-feature-sampling, no-split."),
    ] = "fspad",
    intermediate_size: Annotated[
        int | None, typer.Option(help="Width of its MLPs; default: the target's.")
    ] = None,
    max_length: given.MaxLength = 2048,
    held_out: given.HeldOut = 0.02,
    features: given.Features = None,
    skip_bad: given.SkipBad = False,
    epochs: given.Epochs = 20,
    max_steps: given.MaxSteps = None,
    batch: given.Batch = 4,
    accumulate: given.Accumulate = 1,
    lr: given.Lr = 5e-5,
    schedule: given.Schedule = "linear",
    warmup: given.Warmup = None,
    weight_decay: given.WeightDecay = 0.01,
    clip_value: given.ClipValue = 0.5,
    clip_norm: given.ClipNorm = 0.0,
    noise: Annotated[float, typer.Option(help="On input features.", rich_help_panel=RECIPE)] = 0.2,
    regression_weight: Annotated[float, typer.Option(rich_help_panel=RECIPE)] = 1.0,
    classification_weight: Annotated[float, typer.Option(rich_help_panel=RECIPE)] = 0.1,
    seed: given.TrainSeed = 0,
    precision: given.Precision = "auto",
    max_minutes: given.MaxMinutes = None,
    save_steps: given.SaveSteps = None,
    save_minutes: given.SaveMinutes = 10.0,
    log_steps: given.LogSteps = 20,
    save_dtype: given.SaveDtype = "bfloat16",
    depth: given.Depth = 5,
    tensorboard: given.Tensorboard = True,
    restart: given.Restart = False,
    threads: given.Threads = None,
    json: given.Json = False,
) -> None:
    """Train FSPAD, EAGLE-2 or one between them. The same command goes on after an interruption."""
    _require_accelerate()
    from specrt.cli.loading import set_threads, target_directory
    from specrt.train.loop.options import FspadOptions
    from specrt.train.run import TrainJob, train_fspad

    options = FspadOptions(
        batch_size=batch,
        accumulation_steps=accumulate,
        epochs=epochs,
        max_steps=max_steps,
        max_minutes=max_minutes,
        lr=lr,
        schedule=schedule,
        warmup_steps=warmup,
        weight_decay=weight_decay,
        clip_value=clip_value or None,
        clip_norm=clip_norm or None,
        noise=noise,
        regression_weight=regression_weight,
        classification_weight=classification_weight,
        precision=precision,
        seed=seed,
        depth=depth,
        save_steps=save_steps,
        save_minutes=save_minutes,
        log_steps=log_steps,
        save_dtype=save_dtype,
        tensorboard=tensorboard,
    )
    directory, name = target_directory(target)
    job = TrainJob(
        target=directory,
        target_name=name,
        data=tuple(data),
        out=out,
        max_length=max_length,
        held_out=held_out,
        features=features,
        skip_bad=skip_bad,
        is_restart=restart,
    )
    set_threads(threads)
    outcome = train_fspad(job, options, arch=arch, intermediate_size=intermediate_size)
    end(outcome, out, is_json=json)


@app.command()
def eesd(
    target: given.Target,
    out: given.Out,
    exit_layer: Annotated[
        list[int],
        typer.Option(help="Layers run before the exit; repeat it to compare several."),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSONL or JSON, best of `specrt distill-data`; repeatable. Default: text the "
            "target makes by itself first, in OUT/distilled.jsonl.",
            rich_help_panel=DATA,
        ),
    ] = None,
    num_texts: Annotated[
        int, typer.Option(help="Without --data: texts to make.", rich_help_panel=DATA)
    ] = 96,
    max_length: given.MaxLength = 2048,
    held_out: given.HeldOut = 0.1,
    features: given.Features = None,
    skip_bad: given.SkipBad = False,
    epochs: given.Epochs = 20,
    max_steps: given.MaxSteps = None,
    batch: given.Batch = 8,
    accumulate: given.Accumulate = 1,
    lr: given.Lr = 1e-3,
    schedule: given.Schedule = "cosine",
    warmup: given.Warmup = None,
    weight_decay: given.WeightDecay = 0.01,
    clip_value: given.ClipValue = 0.0,
    clip_norm: given.ClipNorm = 1.0,
    seed: given.TrainSeed = 0,
    precision: given.Precision = "auto",
    max_minutes: given.MaxMinutes = None,
    save_steps: given.SaveSteps = None,
    save_minutes: given.SaveMinutes = 10.0,
    log_steps: given.LogSteps = 20,
    save_dtype: given.SaveDtype = "bfloat16",
    depth: given.Depth = 8,
    tensorboard: given.Tensorboard = True,
    restart: given.Restart = False,
    threads: given.Threads = None,
    json: given.Json = False,
) -> None:
    """Train early exits of a target. The same command goes on after an interruption."""
    _require_accelerate()
    from specrt.cli.loading import set_threads, target_directory
    from specrt.cli.own_text import TEXTS_FILE, write_own_text
    from specrt.train.loop.options import EesdOptions
    from specrt.train.run import TrainJob, train_eesd

    options = EesdOptions(
        batch_size=batch,
        accumulation_steps=accumulate,
        epochs=epochs,
        max_steps=max_steps,
        max_minutes=max_minutes,
        lr=lr,
        schedule=schedule,
        warmup_steps=warmup,
        weight_decay=weight_decay,
        clip_value=clip_value or None,
        clip_norm=clip_norm or None,
        precision=precision,
        seed=seed,
        depth=depth,
        save_steps=save_steps,
        save_minutes=save_minutes,
        log_steps=log_steps,
        save_dtype=save_dtype,
        tensorboard=tensorboard,
    )
    directory, name = target_directory(target)

    def write_data() -> None:
        write_own_text(
            target,
            out,
            num_texts=num_texts,
            max_new_tokens=min(max_length - 1, _MAX_TEXT),
            seed=seed,
            is_restart=restart,
        )

    job = TrainJob(
        target=directory,
        target_name=name,
        data=tuple(data) if data else (out / TEXTS_FILE,),
        write_data=None if data else write_data,
        out=out,
        max_length=max_length,
        held_out=held_out,
        features=features,
        skip_bad=skip_bad,
        is_restart=restart,
    )
    set_threads(threads)
    end(train_eesd(job, options, exit_layer), out, is_json=json)


def _require_accelerate() -> None:
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise ValueError("training needs accelerate: pip install 'specrt[train]'")
