"""Exits over a target of nothing but a table, with their trainer.

As in :mod:`tests.train.support` the feature at a token is a code of that token, from which the head
reads the one that comes after it in a fixed permutation. What a tapped layer gives is that code,
turned, so an exit can learn what the target says, and only from the token it is at.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from specrt.draft.eesd.checkpoint import ExitConfig
from specrt.train.device import TrainDevice
from specrt.train.eesd.module import ExitModule
from specrt.train.eesd.task import EesdTask
from specrt.train.features.source import Sample
from specrt.train.loop.options import EesdOptions
from specrt.train.loop.processes import make_accelerator
from specrt.train.loop.report import Reporter
from specrt.train.loop.state import StateFolder
from specrt.train.loop.trainer import Outcome, Trainer, run_identity
from specrt.train.task import TrainData
from tests.train.support import HIDDEN, LITTLE, TARGET, MemorySource, make_source, tables

DEEP = replace(TARGET, num_layers=4)
EXITS = (1, 3)
OPTIONS = EesdOptions(max_steps=6, depth=4, **LITTLE)


def exit_config(exit_layer: int) -> ExitConfig:
    """An exit of :data:`DEEP`."""
    return ExitConfig.for_target(DEEP, exit_layer, name="table")


def random_layer(seed: int = 3) -> dict[str, torch.Tensor]:
    """Weights to start from."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, like in ExitModule(exit_config(1)).model.state_dict().items():
        noise = torch.randn(like.shape, generator=generator)
        tensors[name] = noise * HIDDEN**-0.5 if like.dim() == 2 else 1 + 0.1 * noise
    return tensors


def make_exit_source(
    num_samples: int = 24, *, shift: int = 0, exits: tuple[int, ...] = EXITS
) -> MemorySource:
    """The samples of :func:`make_source`, features ``shift`` positions early, with taps."""
    source = make_source(num_samples)
    for number, sample in enumerate(source.samples):
        turned = [sample.features @ _turn(exit_layer) for exit_layer in exits]
        features = torch.cat([*turned, sample.features.roll(-shift, 0)], -1)
        source.samples[number] = Sample(sample.token_ids, sample.loss_mask, features)
    return source


def make_exit_trainer(
    out: Path,
    options: EesdOptions = OPTIONS,
    source: MemorySource | None = None,
    exits: tuple[int, ...] = EXITS,
    device: TrainDevice | None = None,
    **given: Any,
) -> Trainer:
    """A trainer on all but the last four sequences; ``given`` goes to ``StateFolder.claim``."""
    source = source or make_exit_source(exits=exits)
    accelerator = make_accelerator(options)
    task = EesdTask(DEEP, [exit_config(n) for n in exits], tables, random_layer, options)
    train = range(len(source) - 4)
    state = StateFolder(out, run_identity(task, options, accelerator, "table", train), accelerator)
    state.claim(**given)
    data = TrainData(source, train, range(len(source) - 4, len(source)))
    run = {"out": out, "state": state, "accelerator": accelerator, "device": device}
    return Trainer(task, data, options, **run)


def train_exits(out: Path, options: EesdOptions = OPTIONS, **given: Any) -> Outcome:
    """Run a trainer, silently."""
    with Path(os.devnull).open("w") as sink, Reporter(True, None, Console(file=sink)) as reporter:
        return make_exit_trainer(out, options, **given).run(reporter)


def _turn(exit_layer: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(exit_layer)
    return torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0]
