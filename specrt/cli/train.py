"""``specrt train``: the options of training, and what is printed at its end."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from specrt.train.loop import Outcome

app = typer.Typer(name="train", help="Train a drafter for a target.", no_args_is_help=True)

_DATA, _RECIPE, _RUN = "Data", "Recipe", "Run"


@app.command()
def fspad(
    target: Annotated[str, typer.Option(help="A Hugging Face directory, or 'builtin'.")],
    data: Annotated[
        list[Path],
        typer.Option(help="JSONL or JSON with conversations; repeatable.", rich_help_panel=_DATA),
    ],
    out: Annotated[Path, typer.Option(help="The drafter's directory.")],
    arch: Annotated[
        str,
        typer.Option(help="fspad, eagle2, or between them no-feature-sampling, no-split."),
    ] = "fspad",
    intermediate_size: Annotated[
        int | None, typer.Option(help="Width of its MLPs; default: the target's.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(help="Longer sequences are cut.", rich_help_panel=_DATA)
    ] = 2048,
    held_out: Annotated[
        float, typer.Option(help="Share of the data kept apart.", rich_help_panel=_DATA)
    ] = 0.02,
    features: Annotated[
        str | None,
        typer.Option(
            help="'online', or a directory for the target's features; default: OUT/features, "
            "removed at the end, and online where no sequence is seen twice.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip malformed lines.", rich_help_panel=_DATA)
    ] = False,
    epochs: Annotated[int, typer.Option(rich_help_panel=_RECIPE)] = 20,
    max_steps: Annotated[
        int | None, typer.Option(help="At most so many steps.", rich_help_panel=_RECIPE)
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Sequences a step, in all.", rich_help_panel=_RECIPE)
    ] = 4,
    accumulate: Annotated[
        int, typer.Option(help="In so many parts a process.", rich_help_panel=_RECIPE)
    ] = 1,
    lr: Annotated[float, typer.Option(rich_help_panel=_RECIPE)] = 5e-5,
    schedule: Annotated[
        str, typer.Option(help="linear or cosine.", rich_help_panel=_RECIPE)
    ] = "linear",
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Steps; default: 2000, at most a tenth of the run.", rich_help_panel=_RECIPE
        ),
    ] = None,
    weight_decay: Annotated[float, typer.Option(rich_help_panel=_RECIPE)] = 0.01,
    clip_value: Annotated[
        float, typer.Option(help="Of each gradient; 0: off.", rich_help_panel=_RECIPE)
    ] = 0.5,
    clip_norm: Annotated[
        float, typer.Option(help="Of all gradients; 0: off.", rich_help_panel=_RECIPE)
    ] = 0.0,
    noise: Annotated[float, typer.Option(help="On input features.", rich_help_panel=_RECIPE)] = 0.2,
    regression_weight: Annotated[float, typer.Option(rich_help_panel=_RECIPE)] = 1.0,
    classification_weight: Annotated[float, typer.Option(rich_help_panel=_RECIPE)] = 0.1,
    seed: Annotated[int, typer.Option(rich_help_panel=_RECIPE)] = 0,
    precision: Annotated[
        str, typer.Option(help="auto, bf16 or float32.", rich_help_panel=_RUN)
    ] = "auto",
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop then; going on is possible.", rich_help_panel=_RUN)
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Save the state so often.", rich_help_panel=_RUN)
    ] = None,
    save_minutes: Annotated[float, typer.Option(rich_help_panel=_RUN)] = 10.0,
    log_steps: Annotated[int, typer.Option(rich_help_panel=_RUN)] = 20,
    save_dtype: Annotated[
        str, typer.Option(help="bfloat16, float16 or float32.", rich_help_panel=_RUN)
    ] = "bfloat16",
    depth: Annotated[
        int, typer.Option(help="Of the chains on held-out data.", rich_help_panel=_RUN)
    ] = 5,
    tensorboard: Annotated[
        bool, typer.Option(help="Write OUT/tensorboard.", rich_help_panel=_RUN)
    ] = True,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what OUT holds.", rich_help_panel=_RUN)
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="Default: torch's.", rich_help_panel=_RUN)
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="The summary as JSON.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Train FSPAD, EAGLE-2 or one between them. The same command goes on after an interruption."""
    _require_accelerate()
    from specrt.cli.loading import set_threads, target_directory
    from specrt.train.options import FspadOptions
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
    _end(outcome, out, is_json=json)


def _require_accelerate() -> None:
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise ValueError("training needs accelerate: pip install 'specrt[train]'")


def _end(outcome: Outcome, out: Path, *, is_json: bool) -> None:
    """Print the summary; a run that a signal stopped ends with that signal's exit code."""
    if not outcome.is_done:
        typer.echo(f"stopped and saved in {out}; the same command goes on from there", err=True)
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)
    if outcome.summary:  # only the main process has one
        text = jsonlib.dumps(outcome.summary) if is_json else _described(outcome.summary, out)
        typer.echo(text)


def _described(summary: dict[str, Any], out: Path) -> str:
    lines = [
        f"{summary['arch']}: {summary['num_parameters'] / 1e6:.2f} M parameters, "
        f"{summary['num_steps']} steps, {summary['num_tokens']} tokens",
        f"{summary['tokens_per_second']:.0f} tokens/s, peak memory "
        f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB",
    ]
    held_out = summary["held_out"]
    if held_out["num_sequences"]:
        rates = " ".join(f"{rate:.3f}" for rate in held_out["acceptance_rate"])
        lines.append(
            f"held-out, teacher-forced chain: acceptance by depth {rates}, "
            f"expected tau {held_out['tau']:.2f} ({held_out['num_sequences']} sequences)"
        )
    return "\n".join([*lines, f"drafter: {out}"])
