"""A small target with an EESD exit that is often right, though it was never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from specrt.config import ModelConfig
from specrt.draft.eesd.checkpoint import (
    ExitConfig,
    exit_tensor_shapes,
    load_exit,
    read_exit,
    write_exit,
)
from specrt.draft.eesd.drafter import EesdDrafter
from specrt.draft.eesd.launched import LaunchedEesdDrafter
from specrt.draft.eesd.model import ExitModel
from specrt.draft.eesd.on_device import DeviceEesdDrafter
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.costs import DraftCosts
from specrt.models.model import LlamaModel
from tests.checkpoints import make_checkpoint

NUM_LAYERS, EXIT_LAYER = 4, 3
# Of plain rounds; given, so that decisions do not depend on the machine.
COSTS = DraftCosts(fixed=0.05, step=0.3, lower=0.2, verify=0.8, row=0.05)


def make_exit_pair(folder: Path, **overrides: Any) -> tuple[Path, Path]:
    """Write a random target of four layers, and an exit behind three of them.

    The exit is the target's own last layer, a little off: right often, but not always.

    Args:
        folder: gets ``target`` and ``exit``.
        **overrides: of the target's configuration.
    """
    target, directory = folder / "target", folder / "exit"
    make_checkpoint("llama", target, num_hidden_layers=NUM_LAYERS, **overrides)
    config = ExitConfig.for_target(ModelConfig.from_directory(target), EXIT_LAYER, name="target")
    own = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in exit_tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if key.startswith("calibration."):
            tensors[key] = 0.2 * noise + float(key.endswith("slope"))
        else:
            last = key.replace(".layers.0.", f".layers.{NUM_LAYERS - 1}.")
            tensors[key] = own[last] + 0.04 * noise
    write_exit(directory, config, tensors)
    return target, directory


def make_drafter(
    model: LlamaModel, path: Path, kind: str = "calibration-ts", **options: object
) -> EesdDrafter:
    """An EESD drafter of given costs for a model in memory; ``options`` are its controller's."""
    config = read_exit(path, model.config)
    weights = load_exit(path, config, model.weights, model.device)
    exit_model = ExitModel(config, weights, model)
    control = ControlOptions(kind=kind, **options)  # type: ignore[arg-type]
    return EesdDrafter(exit_model, control, costs=COSTS)


def make_device_drafter(
    model: LlamaModel, path: Path, kind: str = "calibration-ts", **options: object
) -> DeviceEesdDrafter:
    """As :func:`make_drafter`, on the model's GPU."""
    like = make_drafter(model, path, kind, **options)
    return DeviceEesdDrafter(like.exit_model, like.control.options, costs=COSTS)


def make_launched_drafter(
    model: LlamaModel, path: Path, kind: str = "calibration-ts", **options: object
) -> LaunchedEesdDrafter:
    """As :func:`make_device_drafter`, whose rounds may be launches alone."""
    like = make_drafter(model, path, kind, **options)
    return LaunchedEesdDrafter(like.exit_model, like.control.options, costs=COSTS)
