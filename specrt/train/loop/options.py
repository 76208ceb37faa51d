"""What a training run is told, and the learning rate that follows from it.

The dataclasses are the options of ``specrt train`` too: name, type and default are a field's, the
rest stands in its ``Annotated``. Nothing here imports torch, so that ``--help`` is quick.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

PRECISIONS = ("auto", "bf16", "float32")
SCHEDULES = ("linear", "cosine")
SAVE_DTYPES = ("bfloat16", "float16", "float32")
# What may differ between the two halves of an interrupted run: it changes nothing of what is
# computed, but for the device, which rounds otherwise.
_FREE = frozenset(
    {
        "device",
        "max_minutes",
        "save_steps",
        "save_minutes",
        "log_steps",
        "save_dtype",
        "depth",
        "tensorboard",
    }
)


def _data(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Data")


def _recipe(*names: str, help: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Recipe")


def _run(*names: str, help: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Run")


def _choice(choices: tuple[str, ...]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}."


# Those that kinds have defaults of their own for.
HeldOut = Annotated[float, _data(help="Share of the data kept apart.")]
BatchSize = Annotated[int, _recipe("--batch", help="Sequences a step, in all.")]
Lr = Annotated[float, _recipe()]
Schedule = Annotated[str, _recipe(help=_choice(SCHEDULES))]
ClipValue = Annotated[float, _recipe(help="Of each gradient; 0: off.")]
ClipNorm = Annotated[float, _recipe(help="Of all gradients; 0: off.")]
Depth = Annotated[int, _run(help="Of the chains on held-out data.")]


@dataclass(frozen=True)
class DataOptions:
    """Which of the data a run is given, and how.

    Raises:
        ValueError: a field is out of range.
    """

    max_length: Annotated[int, _data(help="Longer sequences are cut.")] = 2048
    held_out: HeldOut = 0.02
    features: Annotated[
        str | None,
        _data(
            help="'online', 'memory', or a directory for the target's features; default: online "
            "where no sequence is seen twice, else a GPU's memory where they fit, else "
            "OUT/features, removed at the end."
        ),
    ] = None
    skip_bad: Annotated[bool, _data("--skip-bad", help="Skip malformed lines.")] = False

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length: expected at least 2, got {self.max_length}")
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"held_out: expected a share in [0, 1), got {self.held_out}")


@dataclass(frozen=True)
class EesdDataOptions(DataOptions):
    """Of EESD, which may be trained on few texts."""

    held_out: HeldOut = 0.1


@dataclass(frozen=True)
class TrainOptions:
    """What the recipes of all kinds of drafters have in common."""

    epochs: Annotated[int, _recipe()] = 20
    max_steps: Annotated[int | None, _recipe(help="At most so many steps.")] = None
    batch_size: BatchSize = 4
    """Over all processes and accumulation steps together."""
    accumulation_steps: Annotated[
        int, _recipe("--accumulate", help="In so many parts a process.")
    ] = 1
    lr: Lr = 5e-5
    schedule: Schedule = "linear"
    warmup_steps: Annotated[
        int | None, _recipe("--warmup", help="Steps; default: 2000, at most a tenth of the run.")
    ] = None
    weight_decay: Annotated[float, _recipe()] = 0.01
    clip_value: ClipValue = 0.5
    clip_norm: ClipNorm = 0.0
    seed: Annotated[int, _recipe()] = 0
    device: Annotated[str, _run(help="auto (a GPU if torch sees one), cpu, cuda or cuda:N.")] = (
        "auto"
    )
    precision: Annotated[str, _run(help=_choice(PRECISIONS))] = "auto"
    max_minutes: Annotated[float | None, _run(help="Stop then; going on is possible.")] = None
    """Time spent training, earlier parts of a resumed run included."""
    save_steps: Annotated[int | None, _run(help="Save the state so often.")] = None
    save_minutes: Annotated[float, _run()] = 10.0
    log_steps: Annotated[int, _run()] = 20
    save_dtype: Annotated[str, _run(help=_choice(SAVE_DTYPES))] = "bfloat16"
    depth: Depth = 5
    tensorboard: Annotated[bool, _run(help="Write OUT/tensorboard.")] = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation_steps", "epochs", "depth", "log_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_steps", "save_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "weight_decay", "clip_value", "clip_norm"):
            _at_least(name, getattr(self, name), 0)
        for name in ("lr", "max_minutes", "save_minutes"):
            _positive(name, getattr(self, name))
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("save_dtype", self.save_dtype, SAVE_DTYPES)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def learning_rate(self, step: int, total: int) -> float:
        """The rate of step ``step`` (from 0) of ``total``: a linear warm-up, then a decay to 0."""
        warmup = min(2000, total // 10) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, total - warmup)
        left = 1.0 - done if self.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
        return self.lr * left

    def fixed(self) -> dict[str, Any]:
        """What a resumed run must share with its first part."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


@dataclass(frozen=True)
class FspadOptions(TrainOptions):
    """The recipe of FSPAD; all defaults are the paper's (arXiv 2408.15562, section 4)."""

    noise: Annotated[float, _recipe(help="On input features.")] = 0.2
    """Width of the uniform noise, for sequences of 512 tokens."""
    regression_weight: Annotated[float, _recipe()] = 1.0
    classification_weight: Annotated[float, _recipe()] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("noise", "regression_weight", "classification_weight"):
            _at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class EesdOptions(TrainOptions):
    """The recipe of EESD, for one layer that starts as the target's last; all defaults are ours."""

    batch_size: BatchSize = 8
    lr: Lr = 1e-3
    schedule: Schedule = "cosine"
    clip_value: ClipValue = 0.0
    clip_norm: ClipNorm = 1.0
    depth: Depth = 8


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive number, got {value}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
