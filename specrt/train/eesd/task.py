"""The exits of EESD, one or several at once, as the loop trains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specrt.config import ModelConfig, read_json
from specrt.draft.eesd.checkpoint import (
    CALIBRATION,
    ExitConfig,
    is_exit_checkpoint,
    write_exit,
)
from specrt.train.batches import ExitBatch, collate_exits
from specrt.train.device import TrainDevice
from specrt.train.eesd.calibration import MODES, ExitWatch, GumbelRows, calibration_losses
from specrt.train.eesd.evaluate import Estimate, evaluate_exit
from specrt.train.eesd.module import ExitModule, ExitModules, exit_weights, parameter_groups
from specrt.train.features.source import FeatureSource
from specrt.train.head import TargetTables
from specrt.train.loop.options import EesdOptions
from specrt.train.loop.summary import SUMMARY_FILE, brief, write_summary
from specrt.train.losses import TOP, FrozenHead, soft_cross_entropy
from specrt.train.task import StepLosses, TrainData

_NAMES = (
    "classification",
    *(f"calibration_{mode}" for mode in MODES),
    *(f"top{k}" for k in range(1, TOP + 1)),
)
"""What is logged of every exit, in the order of its sums."""


class EesdTask:
    """Exits after the target's first N layers; a :class:`specrt.train.task.TrainTask`.

    Args:
        target: the target's configuration.
        configs: one for each N, in the order of N.
        load_tables: gives the target's embedding and head.
        load_start: gives the weights that every exit begins with (``read_last_layer``).
        options: the recipe.
    """

    def __init__(
        self,
        target: ModelConfig,
        configs: Sequence[ExitConfig],
        load_tables: Callable[[], TargetTables],
        load_start: Callable[[], Mapping[str, torch.Tensor]],
        options: EesdOptions,
    ) -> None:
        self._target, self._configs, self._options = target, configs, options
        self._load_tables, self._load_start = load_tables, load_start

    @property
    def taps(self) -> tuple[int, ...]:
        """As :class:`TrainTask` says: the exits' N."""
        return tuple(config.exit_layer for config in self._configs)

    def identity(self) -> dict[str, Any]:
        """As :class:`TrainTask` says."""
        return {
            "arch": "eesd",
            "target": self._configs[0].target_fingerprint,
            "exit_layers": list(self.taps),
        }

    def start(self, device: TrainDevice, dtype: torch.dtype) -> nn.Module:
        """As :class:`TrainTask` says."""
        self._device = device.memory
        self._full_head = self._load_tables().head
        self._head = FrozenHead(self._full_head.to(self._device, dtype), device)
        modules = ExitModules(self._configs, self._load_start())
        self._position_flop = modules.flop()
        return modules

    def collate(self, source: FeatureSource, indices: Sequence[int], epoch: int) -> ExitBatch:
        """As :class:`TrainTask` says."""
        seed = self._options.seed
        return collate_exits(source, indices, seed=seed, epoch=epoch, device=self._device)

    def losses(self, module: Any, batch: ExitBatch, *, has_hits: bool) -> StepLosses:
        """As :class:`TrainTask` says; no exit's gradient depends on another's."""
        counts = batch.is_counted.sum(1).tolist()
        features = batch.states[:, :, -1].flatten(0, 1)[batch.counted]
        total, sums = self._device.zeros(), []
        for output in module(batch.states[:, :, :-1]):
            noise = GumbelRows(batch.draw_seeds, counts, len(self._head.weight), self._device)
            watch = ExitWatch(len(features), noise, self._head.counter(), has_hits=has_hits)
            normed, evidence = (
                rows.flatten(0, 1)[batch.counted] for rows in (output.normed, output.evidence)
            )
            loss = soft_cross_entropy(normed, features, self._head, watch)
            calibration = calibration_losses(evidence, output.slope, watch.judged)
            total = total + loss + calibration.sum()
            sums += [loss.detach()[None], calibration.detach(), watch.hits]
        return StepLosses(total, torch.cat(sums))

    def num_flop(self, batch: ExitBatch) -> int:
        """As :class:`TrainTask` says; the head gives two laws and a gradient for each exit."""
        heads = 6 * len(self._configs) * batch.num_counted * self._head.weight.numel()
        return batch.is_counted.numel() * self._position_flop + heads

    def clip_groups(self, module: Any) -> list[list[nn.Parameter]]:
        """As :class:`TrainTask` says."""
        return parameter_groups(module)

    def named(self, means: Sequence[float]) -> dict[str, float]:
        """As :class:`TrainTask` says; ``loss`` is the mean of the exits' classification losses."""
        size = len(_NAMES)
        values = {
            f"exit-{number}/{name}": mean
            for place, number in enumerate(self.taps)
            for name, mean in zip(_NAMES, means[place * size : (place + 1) * size], strict=True)
        }
        return {"loss": sum(means[::size]) / len(self._configs), **values}

    def finish(
        self, out: Path, weights: dict[str, torch.Tensor], data: TrainData, run: dict[str, Any]
    ) -> dict[str, Any]:
        """As :class:`TrainTask` says: one exit goes to ``out``, several to ``out/exit-N`` each."""
        replaced = _places(out, _written_exits(out))
        places = _places(out, self.taps)
        exits = []
        for column, config in enumerate(self._configs):
            tensors = self._stored(exit_weights(weights, config.exit_layer))
            exits.append(self._report(column, tensors, data))
            said = {"exits": exits[-1:], **brief(run)}
            dtype = getattr(torch, self._options.save_dtype)
            layer = replace(config.layer, dtype=dtype)
            extra = {**config.extra, "training": said}
            write_exit(places[column], replace(config, layer=layer, extra=extra), tensors)
        summary = {"arch": "eesd", "exits": exits, **run}
        write_summary(out, summary)
        for path in set(replaced) - set(places):
            _remove(path)
        return summary

    def _report(
        self, column: int, tensors: Mapping[str, torch.Tensor], data: TrainData
    ) -> dict[str, Any]:
        """What there is to say of one exit, as stored."""
        config = self._configs[column]
        model = ExitModule(config).requires_grad_(False)
        model.load_state_dict(tensors)
        report = evaluate_exit(
            model.to(self._device.place),
            column,
            self._full_head.to(self._device, torch.float32),
            data.source,
            data.held_out,
            device=self._device,
            depth=self._options.depth,
            seed=self._options.seed,
        )
        return {
            "exit_layer": config.exit_layer,
            "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
            "held_out": report.as_dict(),
            "estimate": asdict(Estimate.make(self._target, config.exit_layer, report.acceptance)),
        }

    def _stored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """In the dtypes of the checkpoint: the calibration head stays in float32."""
        dtype = getattr(torch, self._options.save_dtype)
        return {k: t if k in CALIBRATION else t.to(dtype) for k, t in tensors.items()}


def _places(out: Path, exit_layers: Sequence[int]) -> list[Path]:
    """Where a run's exits are: a single one is ``out`` itself."""
    if len(exit_layers) == 1:
        return [out]
    return [out / f"exit-{number}" for number in exit_layers]


def _written_exits(out: Path) -> list[int]:
    """N of the exits that an earlier run, which this one replaces, has left."""
    try:
        exits = read_json(out / SUMMARY_FILE).get("exits", [])
        return [int(one["exit_layer"]) for one in exits]
    except (KeyError, TypeError, ValueError):  # none, or one that is damaged: this run's follows
        return []


def _remove(path: Path) -> None:
    """Remove an exit that would be mistaken for this run's, and nothing else."""
    if is_exit_checkpoint(path):
        (path / "config.json").unlink()
        (path / "model.safetensors").unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        path.rmdir()
