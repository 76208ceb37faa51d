"""The training loop: one process, several, or sharded, by ``accelerate``.

A step's sequences, noise and learning rate are functions of (seed, step), and the state saved is
all there is besides; so a run taken up again after a kill goes on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from specrt.device import Posted
from specrt.train.batches import BatchPlan
from specrt.train.device import TrainDevice
from specrt.train.loop.options import TrainOptions
from specrt.train.loop.progress import Progress, Settled, Taken, speed
from specrt.train.loop.report import Reporter
from specrt.train.loop.state import StateFolder
from specrt.train.loop.stopping import StopRequest
from specrt.train.task import TaskBatch, TrainData, TrainTask

_BETAS = (0.9, 0.95)
_MAX_NAMED = 8


class TrainingError(RuntimeError):
    """A run that cannot go on: the loss, a gradient or a weight is not finite."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    is_done: bool
    """False: stopped early, to be taken up by running the same again."""
    signal: int | None
    """The signal that stopped it; no drafter is written then."""
    summary: dict[str, Any]
    """What ``training.json`` holds; empty after a signal, and in all but the main process."""


def run_identity(
    task: TrainTask,
    options: TrainOptions,
    accelerator: Accelerator,
    content_hash: str,
    train: Sequence[int],
) -> dict[str, Any]:
    """What a run must share with the one it takes up, for its result to be the same.

    Args:
        task, options: what is trained, and how.
        accelerator: the number of processes and their precision count.
        content_hash: of the data.
        train: the sequences trained on.
    """
    data = json.dumps([content_hash, *map(int, train)]).encode()
    return {
        **task.identity(),
        "data": hashlib.sha256(data).hexdigest()[:16],
        "num_processes": accelerator.num_processes,
        "mixed_precision": str(accelerator.mixed_precision),
        **options.fixed(),
    }


class Trainer:
    """Trains what a task describes.

    Args:
        task: the drafter's kind.
        data: its sequences.
        options: the recipe.
        out: where the drafter and its summary go.
        state: where the running state goes; one that is there is taken up.
        accelerator: this process's place among all.
        device: where it trains; None: where the accelerator says.

    Raises:
        ValueError: no sequences, or a batch that cannot be split evenly.
    """

    def __init__(
        self,
        task: TrainTask,
        data: TrainData,
        options: TrainOptions,
        *,
        out: Path,
        state: StateFolder,
        accelerator: Accelerator,
        device: TrainDevice | None = None,
    ) -> None:
        if not data.train:
            raise ValueError("data: no sequence to train on")
        self._task, self._data, self._options = task, data, options
        self._out, self._state, self._accelerator = out, state, accelerator
        self._plan = BatchPlan(data.train, data.source.lengths, options.batch_size, options.seed)
        self._num_parts = accelerator.num_processes * options.accumulation_steps
        if self._plan.batch_size % self._num_parts:
            raise ValueError(
                f"batch_size: {self._plan.batch_size} sequences cannot be split evenly over "
                f"{accelerator.num_processes} processes x {options.accumulation_steps} "
                "accumulation steps"
            )
        self._total = options.total_steps(self._plan.steps_per_epoch)
        is_bf16 = accelerator.mixed_precision == "bf16"
        self._device = device or TrainDevice.at(accelerator.device)
        peak = self._device.product_peak if is_bf16 else None
        self._peak = peak and accelerator.num_processes * peak
        module = task.start(self._device, torch.bfloat16 if is_bf16 else torch.float32)
        self._model, self._optimizer = self._prepare(module)
        self._clip_groups = task.clip_groups(self._model)
        self._progress = Progress()
        self._taken: deque[Taken] = deque()
        self._last_seconds = 0.0
        self._saved_at = time.monotonic()
        self._saved_step: int | None = None

    def run(self, reporter: Reporter) -> Outcome:
        """Train to the end, a signal or the time limit.

        A drafter is written unless a signal came; unless the end was reached, the state is kept.

        Raises:
            TrainingError: something is not finite; the last good state is kept.
            OSError: the state or the drafter cannot be written.
        """
        self._resume(reporter)
        reporter.start(self._progress.step, self._total)
        with StopRequest() as stop:
            while self._progress.step < self._total and self._step(reporter, stop):
                pass
        is_done = self._progress.step >= self._total
        self._save(reporter)  # of a run that is done too: writing the drafter may fail
        if stop.signal is not None and not is_done:
            return Outcome(False, stop.signal, {})
        summary = self._finish()
        if is_done and self._accelerator.is_main_process:
            self._state.remove()
        return Outcome(is_done, None, summary)

    # --- a step -----------------------------------------------------------------------------------

    def _step(self, reporter: Reporter, stop: StopRequest) -> bool:
        """Take one step; False if all agreed to stop before it."""
        began, progress = time.perf_counter(), self._progress
        epoch, indices = self._plan.step(progress.step)
        batches = self._batches(epoch, indices)
        count, num_tokens, is_stopped, is_save_due = self._agree(batches, stop)
        if is_stopped:
            return False
        if is_save_due:
            self._save(reporter)
        is_logged = (progress.step + 1) % self._options.log_steps == 0 or progress.step == 0
        rate = self._options.learning_rate(progress.step, self._total)
        figures = self._gradients(batches, count, is_logged)
        num_flop = self._accelerator.num_processes * sum(map(self._task.num_flop, batches))
        parts = indices, num_tokens, num_flop
        self._taken.append(Taken(progress.step + 1, epoch, *parts, rate, is_logged, figures))
        settled = self._settle(self._device.num_late)
        self._apply(rate)
        progress.step += 1
        progress.num_tokens += num_tokens
        progress.num_flop += num_flop
        self._last_seconds = time.perf_counter() - began
        progress.seconds += self._last_seconds
        self._log(reporter, settled)
        return True

    def _batches(self, epoch: int, indices: list[int]) -> list[TaskBatch]:
        """This process's share of a step, one for each accumulation step."""
        num_parts = self._options.accumulation_steps
        first = self._accelerator.process_index * num_parts
        return [
            self._task.collate(self._data.source, indices[part :: self._num_parts], epoch)
            for part in range(first, first + num_parts)
        ]

    def _agree(self, batches: list[TaskBatch], stop: StopRequest) -> tuple[int, int, bool, bool]:
        """Counted positions and tokens of the whole step; whether to stop, and to save, now."""
        count = sum(batch.num_counted for batch in batches)
        num_tokens = sum(batch.num_tokens for batch in batches)
        is_main = self._accelerator.is_main_process  # whose clock goes for all
        is_stopped = stop.signal is not None or (is_main and self._is_time_up())
        is_save_due = is_main and self._is_save_due()
        if self._accelerator.num_processes == 1:
            return count, num_tokens, is_stopped, is_save_due
        mine = torch.tensor([count, num_tokens, is_stopped, is_save_due], dtype=torch.int64)
        said = self._accelerator.reduce(mine.to(self._accelerator.device), "sum").tolist()
        return int(said[0]), int(said[1]), said[2] > 0, said[3] > 0

    def _gradients(self, batches: list[TaskBatch], count: int, has_hits: bool) -> Posted:
        """Make them, clipped by norm; the step's figures."""
        accelerator = self._accelerator
        # A gradient is that of the sum over all positions, of which DDP takes the processes' mean.
        share = accelerator.num_processes / max(1, count)
        sums = []
        for batch in batches:
            is_last = batch is batches[-1]
            with nullcontext() if is_last else accelerator.no_sync(self._model):
                losses = self._task.losses(self._model, batch, has_hits=has_hits)
                accelerator.backward(losses.total * share)
            sums.append(losses.sums)
        means = accelerator.reduce(reduce(torch.add, sums), "sum") / max(1, count)
        limit = self._options.clip_norm or math.inf
        norms = [accelerator.clip_grad_norm_(group, limit) for group in self._clip_groups]
        return self._device.memory.post(torch.cat([means, torch.stack(norms)]))

    def _apply(self, rate: float) -> None:
        if self._options.clip_value:
            parameters = self._model.parameters()
            self._accelerator.clip_grad_value_(parameters, self._options.clip_value)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    # --- what steps gave --------------------------------------------------------------------------

    def _settle(self, num_left: int) -> list[Settled]:
        """The steps that were taken, but for the last ``num_left``.

        Raises:
            TrainingError: what one of these gave is not finite.
        """
        settled = []
        while len(self._taken) > num_left:
            settled.append(Settled.read(self._taken.popleft(), len(self._clip_groups)))
            if not settled[-1].is_finite:
                raise self._not_finite(settled[-1])
        return settled

    def _log(self, reporter: Reporter, settled: list[Settled]) -> None:
        for one in settled:
            values, taken = None, one.taken
            if taken.is_logged:
                rates = {"lr": taken.rate, **speed(taken, self._last_seconds, self._peak)}
                values = {**self._task.named(one.means), "gradient_norm": one.norm, **rates}
                self._progress.history.append({"step": taken.number, **values})
            reporter.update(taken.number, self._total, values)

    def _settle_all(self, reporter: Reporter) -> None:
        """Wait for every step that was taken."""
        began = time.perf_counter()
        settled = self._settle(0)
        if settled:
            self._progress.seconds += time.perf_counter() - began
        self._log(reporter, settled)

    def _not_finite(self, settled: Settled) -> TrainingError:
        taken = settled.taken
        batches = self._batches(taken.epoch, taken.indices)
        bad = [index for batch in batches for index in batch.bad_rows()]
        cause = "features that are not finite" if bad else "none with features out of range"
        names = [self._data.describe(index) for index in (bad or taken.indices)]
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        values = {**self._task.named(settled.means), "gradient norm": settled.norm}
        said = [f"{name} {v:g}" for name, v in values.items() if not math.isfinite(v)]
        kept = self._state.latest()
        return TrainingError(
            f"step {taken.number}: not finite: {', '.join(said)}; sequences "
            f"{', '.join(names[:_MAX_NAMED])}{more} ({cause}); the last good state is "
            f"{kept or 'none, none was saved yet'}"
        )

    # --- state ------------------------------------------------------------------------------------

    def _prepare(self, model: nn.Module) -> tuple[Any, Any]:
        options = self._options
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=_BETAS, fused=True)
        prepared = self._accelerator.prepare(model, optimizer)
        return prepared[0], prepared[1]

    def _resume(self, reporter: Reporter) -> None:
        if self._state.resume(self._load):
            self._saved_step = self._progress.step
            reporter.say(f"going on from step {self._progress.step}")

    def _load(self, state: Path, progress: dict[str, Any]) -> None:
        self._progress = Progress(**progress)
        self._accelerator.load_state(str(state))

    def _save(self, reporter: Reporter) -> None:
        accelerator = self._accelerator
        if self._saved_step == self._progress.step:
            return
        self._settle_all(reporter)
        is_bad = any(not bool(torch.isfinite(p).all()) for p in self._model.parameters())
        bad = torch.tensor(float(is_bad), device=accelerator.device)
        if float(accelerator.reduce(bad, "sum")):
            raise TrainingError(f"step {self._progress.step}: a weight is not finite; not saved")
        path = self._state.write(
            self._progress.step,
            asdict(self._progress),
            lambda folder: accelerator.save_state(str(folder)),
        )
        self._saved_at, self._saved_step = time.monotonic(), self._progress.step
        reporter.say(f"saved {path}")

    def _is_save_due(self) -> bool:
        every, step = self._options.save_steps, self._progress.step
        is_step = every is not None and step > 0 and step % every == 0
        return is_step or time.monotonic() - self._saved_at > 60.0 * self._options.save_minutes

    def _is_time_up(self) -> bool:
        limit = self._options.max_minutes
        return limit is not None and self._progress.seconds >= 60.0 * limit

    # --- the end ----------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        """Write the drafter and its summary."""
        tensors = self._accelerator.get_state_dict(self._model)
        summary: dict[str, Any] = {}
        if self._accelerator.is_main_process:
            on_cpu = {key: tensor.to("cpu") for key, tensor in tensors.items()}
            summary = self._task.finish(self._out, on_cpu, self._data, self._described())
        self._accelerator.wait_for_everyone()
        return summary

    def _described(self) -> dict[str, Any]:
        """What the summary says of the run itself."""
        progress, accelerator = self._progress, self._accelerator
        return {
            "is_complete": progress.step >= self._total,
            "num_steps": progress.step,
            "num_epochs": progress.step / self._plan.steps_per_epoch,
            "num_sequences": len(self._data.train),
            "num_tokens": progress.num_tokens,
            "num_flop": progress.num_flop,
            "seconds": progress.seconds,
            **speed(progress, progress.seconds, self._peak),
            "peak_memory_bytes": self._device.peak_memory(),
            "device": str(self._device.place),
            "num_processes": accelerator.num_processes,
            "mixed_precision": str(accelerator.mixed_precision),
            "options": asdict(self._options),
            "history": progress.history,
        }
