"""What a training run is told, and the learning rate that follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

PRECISIONS = ("auto", "bf16", "float32")
SCHEDULES = ("linear", "cosine")
SAVE_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
# What may differ between the two halves of an interrupted run without changing what it computes.
_FREE = frozenset(
    {"max_minutes", "save_steps", "save_minutes", "log_steps", "save_dtype", "depth", "tensorboard"}
)


@dataclass(frozen=True)
class TrainOptions:
    """What the recipes of all kinds of drafters have in common."""

    batch_size: int = 4
    """Sequences of an optimizer step, over all processes and accumulation steps together."""
    accumulation_steps: int = 1
    """In how many parts each process runs its share of a batch."""
    epochs: int = 20
    max_steps: int | None = None
    max_minutes: float | None = None
    """Time spent training, earlier parts of a resumed run included."""
    lr: float = 5e-5
    schedule: str = "linear"
    warmup_steps: int | None = None
    """2000 by default, but at most a tenth of the run."""
    weight_decay: float = 0.01
    clip_value: float | None = 0.5
    clip_norm: float | None = None
    precision: str = "auto"
    seed: int = 0
    depth: int = 5
    """Of the chains drafted on held-out data at the end."""
    save_steps: int | None = None
    save_minutes: float = 10.0
    log_steps: int = 20
    save_dtype: str = "bfloat16"
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation_steps", "epochs", "depth", "log_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_steps", "save_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "weight_decay"):
            _at_least(name, getattr(self, name), 0)
        for name in ("lr", "max_minutes", "save_minutes", "clip_value", "clip_norm"):
            _positive(name, getattr(self, name))
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("save_dtype", self.save_dtype, tuple(SAVE_DTYPES))

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

    noise: float = 0.2
    """Width of the uniform noise on input features, for sequences of 512 tokens."""
    regression_weight: float = 1.0
    classification_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("noise", "regression_weight", "classification_weight"):
            _at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class EesdOptions(TrainOptions):
    """The recipe of EESD, for one layer that starts as the target's last; all defaults are ours."""

    batch_size: int = 8
    lr: float = 1e-3
    schedule: str = "cosine"
    clip_value: float | None = None
    clip_norm: float | None = 1.0
    depth: int = 8


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive number, got {value}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
