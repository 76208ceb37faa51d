"""Steps of training on a GPU: drafters of real shapes on random features that lie there.

``% of products`` is the FLOP of a step's matrix products (attention's left out) by its time, as a
share of the rate of one large product in the same run; ``% of peak`` that of the data sheet's rate.
A step is the median of those after the first few, which compile and warm up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import gpu
from bench.gpu import Device
from bench.gpu_report import Measured, run_bench
from bench.harness import parser, start
from bench.limits import Ceilings, Model
from bench.random_target import SPECS, Spec, hf_config
from specrt.builtin import target_path
from specrt.config import ModelConfig
from specrt.draft.eesd.checkpoint import ExitConfig
from specrt.draft.fspad.checkpoint import DraftConfig
from specrt.train.device import TrainDevice
from specrt.train.eesd.module import ExitModule
from specrt.train.eesd.task import EesdTask
from specrt.train.features.source import Sample
from specrt.train.fspad.task import FspadTask
from specrt.train.head import TargetHead, TargetTables
from specrt.train.loop.options import EesdOptions, FspadOptions, TrainOptions
from specrt.train.loop.processes import make_accelerator
from specrt.train.loop.report import Reporter
from specrt.train.loop.state import StateFolder
from specrt.train.loop.trainer import Trainer
from specrt.train.task import TrainData, TrainTask

BUNDLED = "bundled"
_SMALL = Model(64, 96, 4, 4, 2, 16)
_WARM = 4


@dataclass(frozen=True)
class Case:
    """A drafter's kind, its target's shape, and a step's sequences."""

    model: str
    kind: str
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.model} {self.kind}, {self.batch} x {self.length}"


def cases(*, is_real: bool) -> Iterator[Case]:
    """The one with a goal first."""
    sizes = [("Llama-3-8B", 4, 2048), ("Vicuna-7B", 4, 2048), (BUNDLED, 64, 256)]
    for model, batch, length in sizes:
        yield Case(model, "fspad", *((batch, length) if is_real else (2, 8)))
    for kind in ("eagle2", "eesd"):
        yield Case(BUNDLED, kind, *((64, 256) if is_real else (2, 8)))


@dataclass(frozen=True)
class RandomFeatures:
    """As many sequences as a step has, of like length; their features are the same random ones."""

    features: torch.Tensor
    """``[n, (T + 1) * H]``"""
    hidden_size: int
    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices."""
        ids = torch.arange(len(self.features)) % 100
        return [Sample(ids, torch.ones_like(ids, dtype=torch.bool), self.features)] * len(indices)


class _Traceless(Trainer):
    """Saves nothing and writes no drafter."""

    def _save(self, reporter: Reporter) -> None:
        self._settle_all(reporter)

    def _finish(self) -> dict[str, Any]:
        return self._described()


def one_case(case: Case, device: Device, ceilings: Ceilings, l2_bytes: int) -> Measured:
    """A row.

    Args:
        case: which.
        device: to measure on.
        ceilings: its.
        l2_bytes: not asked for: a step reads more than any cache holds.
    """
    is_real = device.place.device == "cuda"
    options = _options(case, is_real=is_real)
    trainer = _trainer(case, options, device.place.device)
    with Path(os.devnull).open("w") as sink, Reporter(False, None, Console(file=sink)) as reporter:
        summary = trainer.run(reporter).summary
    rates = [entry["tokens_per_second"] for entry in summary["history"]][_WARM if is_real else 0 :]
    tokens, rate = case.batch * case.length, statistics.median(rates)
    flop_per_s = summary["num_flop"] / summary["num_tokens"] * rate
    peak = TrainDevice.at(torch.device(device.place.device)).product_peak
    row = {
        "model": case.model,
        "kind": case.kind,
        "tokens": tokens,
        "ms a step": 1e3 * tokens / rate,
        "tokens/s": rate,
        "TFLOP/s": flop_per_s / 1e12,
        "% of products": 100 * flop_per_s / ceilings.flop_per_s,
        "% of peak": None if peak is None else 100 * flop_per_s / peak,
        "GB": summary["peak_memory_bytes"] / 1e9,
    }
    return row, {}


def _options(case: Case, *, is_real: bool) -> Any:
    kind = EesdOptions if case.kind == "eesd" else FspadOptions
    return kind(
        device="cuda" if is_real else "cpu",
        precision="bf16" if is_real else "float32",
        batch_size=case.batch,
        max_steps=20 if is_real else 2,
        log_steps=1,
        tensorboard=False,
    )


def _trainer(case: Case, options: TrainOptions, place: str) -> Trainer:
    config = _target(case.model, is_real=place == "cuda")
    shape = config.vocab_size, config.hidden_size

    def tables() -> TargetTables:
        embed, head = (torch.randn(shape, device=place) * 0.02 for _ in range(2))
        return TargetTables(embed, TargetHead(head))

    task: TrainTask
    if isinstance(options, FspadOptions):
        drafter = DraftConfig.for_target(config, case.kind, name="random")
        task = FspadTask(drafter, tables, options)
    else:
        assert isinstance(options, EesdOptions)
        exit_config = ExitConfig.for_target(config, 1, name="random")
        first = ExitModule(exit_config).model.state_dict()
        task = EesdTask(config, [exit_config], tables, lambda: first, options)
    width = (len(task.taps) + 1) * config.hidden_size
    features = torch.randn(case.length, width, dtype=torch.bfloat16, device=place)
    source = RandomFeatures(features, config.hidden_size, [case.length] * case.batch)
    accelerator = make_accelerator(options)
    out = Path(tempfile.gettempdir()) / "no-drafter"  # never made
    state = StateFolder(out, {}, accelerator)
    data = TrainData(source, range(case.batch), ())
    return _Traceless(task, data, options, out=out, state=state, accelerator=accelerator)


def _target(model: str, *, is_real: bool) -> ModelConfig:
    if not is_real:
        return ModelConfig.from_dict(hf_config(_SMALL, Spec(100, 10000.0, 64)))
    if model == BUNDLED:
        return ModelConfig.from_directory(target_path())
    return ModelConfig.from_dict(hf_config(gpu.TARGETS[model], SPECS[model]))


def main() -> None:
    """The command."""
    arguments = parser(__doc__)
    gpu.add_arguments(arguments, has_cpu_side=False)
    args = start(arguments)
    device = gpu.chosen_device(args)
    run(args, device)


def run(args: argparse.Namespace, device: Device) -> None:
    """Measure and report what the budget allows."""
    found = cases(is_real=device.place.device == "cuda")
    measured: Callable[..., Measured] = one_case
    run_bench("train_cuda", found, measured, args, device)


if __name__ == "__main__":
    main()
