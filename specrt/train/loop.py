"""The training loop: one process, several, or sharded, by ``accelerate``.

A step's sequences, noise and learning rate are functions of (seed, step), and the state saved is
all there is besides; so a run taken up again after a kill goes on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from specrt.draft.checkpoint import DraftConfig, write_checkpoint
from specrt.train.batches import Batch, BatchPlan, collate
from specrt.train.evaluate import TargetTables, chain_acceptance
from specrt.train.features import FeatureSource
from specrt.train.fspad import DraftModel
from specrt.train.losses import TOP, Losses, draft_losses
from specrt.train.options import SAVE_DTYPES, TrainOptions
from specrt.train.report import Reporter
from specrt.train.state import latest_state, read_run, remove_states, write_state

SUMMARY_FILE = "training.json"
_BETAS = (0.9, 0.95)


class TrainingError(RuntimeError):
    """A run that cannot go on: the loss or a weight is not finite."""


@dataclass(frozen=True)
class TrainData:
    """Sequences with features, and which of them are for what."""

    source: FeatureSource
    train: Sequence[int]
    held_out: Sequence[int]
    content_hash: str
    """Changes with the data, so that a run is not taken up with other data."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    is_done: bool
    """False: stopped early, to be taken up by running the same again."""
    signal: int | None
    """The signal that stopped it."""
    summary: dict[str, Any]
    """What ``training.json`` holds; empty for a run that is not done."""


@dataclass
class _Progress:
    """How far a run is; saved with its state."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def make_accelerator(options: TrainOptions) -> Accelerator:
    """An accelerator for this process, as ``accelerate launch`` or plain Python started it."""
    is_set = "ACCELERATE_MIXED_PRECISION" in os.environ  # what `accelerate launch` was told
    if options.precision == "auto" and is_set:
        return Accelerator()
    is_bf16 = options.precision == "bf16" or (options.precision == "auto" and _has_fast_bf16())
    return Accelerator(mixed_precision="bf16" if is_bf16 else "no")


class Trainer:
    """Trains one drafter.

    Args:
        config: the drafter's architecture.
        target: the target's embedding and head.
        data: its sequences.
        options: the recipe.
        out: where the drafter, its summary and the running state go.
        accelerator: this process's place among all.
        is_restart: forget a state that an earlier run has left in ``out``.

    Raises:
        ValueError: too few sequences, a batch that does not divide, or ``out`` holds something
            that does not belong to this run.
    """

    def __init__(
        self,
        config: DraftConfig,
        target: TargetTables,
        data: TrainData,
        options: TrainOptions,
        out: Path,
        accelerator: Accelerator,
        *,
        is_restart: bool = False,
    ) -> None:
        self._accelerator, self._options, self._out = accelerator, options, out
        self._config, self._data, self._full_target = config, data, target
        if not data.train:
            raise ValueError("data: no sequence to train on")
        plan = BatchPlan(data.train, data.source.lengths, options.batch_size, options.seed)
        self._plan = plan
        self._num_parts = accelerator.num_processes * options.accumulation_steps
        if plan.batch_size % self._num_parts:
            raise ValueError(
                f"batch_size: {plan.batch_size} sequences cannot be split evenly over "
                f"{accelerator.num_processes} processes x {options.accumulation_steps} "
                "accumulation steps"
            )
        self._total = options.total_steps(plan.steps_per_epoch)
        is_half = accelerator.mixed_precision == "bf16"
        self._target = target.to(accelerator.device, torch.bfloat16 if is_half else torch.float32)
        self._progress = _Progress()
        self._state = self._find_state(is_restart)
        self._model, self._optimizer = self._prepare(DraftModel(config, options.seed))
        self._saved_at = time.monotonic()
        self._signal: int | None = None

    def run(self, reporter: Reporter) -> Outcome:
        """Train to the end, or to a signal or the time limit; save either way.

        Raises:
            TrainingError: the loss is not finite; the last good state is kept.
        """
        self._resume(reporter)
        reporter.start(self._progress.step, self._total)
        with _caught_signals(self._on_signal):
            while self._progress.step < self._total:
                if not self._step(reporter):
                    break
        is_done = self._progress.step >= self._total
        if not is_done:
            self._save(reporter)
            return Outcome(False, self._signal, {})
        return Outcome(True, None, self._finish(reporter))

    # --- a step -----------------------------------------------------------------------------------

    def _step(self, reporter: Reporter) -> bool:
        """Take one step; False if all agreed to stop before it."""
        began, progress = time.perf_counter(), self._progress
        epoch, indices = self._plan.step(progress.step)
        batches = self._batches(epoch, indices)
        count, num_tokens, is_stopped, is_save_due = self._agree(batches)
        if is_stopped:
            return False
        if is_save_due and progress.step > 0:
            self._save(reporter)
        is_logged = (progress.step + 1) % self._options.log_steps == 0 or progress.step == 0
        rate = self._options.learning_rate(progress.step, self._total)
        values = self._update(batches, count, rate, is_logged, indices)
        progress.step += 1
        progress.num_tokens += num_tokens
        seconds = time.perf_counter() - began
        progress.seconds += seconds
        if is_logged:
            values |= {"lr": rate, "tokens_per_second": num_tokens / seconds}
            progress.history.append({"step": progress.step, **values})
        reporter.update(progress.step, self._total, values if is_logged else None)
        return True

    def _batches(self, epoch: int, indices: list[int]) -> list[Batch]:
        """This process's share of a step."""
        options, rank = self._options, self._accelerator.process_index
        first = rank * options.accumulation_steps
        return [
            collate(
                self._data.source,
                indices[part :: self._num_parts],
                noise=options.noise,
                seed=options.seed,
                epoch=epoch,
            ).to(self._accelerator.device)
            for part in range(first, first + options.accumulation_steps)
        ]

    def _agree(self, batches: list[Batch]) -> tuple[int, int, bool, bool]:
        """Counted positions and tokens of the whole step; whether to stop, and to save, now."""
        count = sum(int(batch.is_counted.sum()) for batch in batches)
        num_tokens = sum(batch.num_tokens for batch in batches)
        is_main = self._accelerator.is_main_process  # whose clock goes for all
        is_stopped = self._signal is not None or (is_main and self._is_time_up())
        is_save_due = is_main and self._is_save_due()
        mine = torch.tensor([count, num_tokens, is_stopped, is_save_due], dtype=torch.int64)
        said = self._accelerator.reduce(mine.to(self._accelerator.device), "sum").tolist()
        return int(said[0]), int(said[1]), said[2] > 0, said[3] > 0

    def _update(
        self,
        batches: list[Batch],
        count: int,
        rate: float,
        is_logged: bool,
        indices: list[int],
    ) -> dict[str, float]:
        accelerator, options = self._accelerator, self._options
        sums = torch.zeros(2 + TOP, device=accelerator.device)
        # Every process's gradient is a share of the sum, and DDP takes the mean.
        share = accelerator.num_processes / max(1, count)
        for batch in batches:
            is_last = batch is batches[-1]
            with nullcontext() if is_last else accelerator.no_sync(self._model):
                losses = self._losses(batch, is_logged)
                loss = options.regression_weight * losses.regression
                loss = loss + options.classification_weight * losses.classification
                accelerator.backward(loss * share)
            pair = torch.stack([losses.regression.detach(), losses.classification.detach()])
            sums += torch.cat([pair, losses.hits])
        means = accelerator.reduce(sums, "sum") / max(1, count)
        self._check_finite(means, indices, batches)
        if options.clip_value is not None:
            accelerator.clip_grad_value_(self._model.parameters(), options.clip_value)
        if options.clip_norm is not None:
            accelerator.clip_grad_norm_(self._model.parameters(), options.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        regression, classification, *hits = means.tolist()
        loss_value = options.regression_weight * regression
        loss_value += options.classification_weight * classification
        names = [f"top{k}" for k in range(1, TOP + 1)]
        return {
            "loss": loss_value,
            "regression": regression,
            "classification": classification,
            **dict(zip(names, hits, strict=True)),
        }

    def _losses(self, batch: Batch, has_hits: bool) -> Losses:
        embeddings = self._target.embed[batch.next_tokens]
        predicted, regressed = self._model(batch.inputs, embeddings)
        counted = batch.is_counted
        return draft_losses(
            predicted[counted],
            regressed[counted],
            batch.targets[counted],
            self._target.head,
            has_hits=has_hits,
        )

    def _check_finite(
        self, means: torch.Tensor, indices: list[int], batches: list[Batch]
    ) -> None:
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g).float() for g in gradients])
        is_good = (torch.isfinite(norms).all() & torch.isfinite(means).all()).float()
        if self._accelerator.reduce(is_good, "mean").item() == 1.0:
            return
        bad_features = [not bool(torch.isfinite(batch.targets).all()) for batch in batches]
        cause = "features that are not finite" if any(bad_features) else "finite features"
        kept = latest_state(self._out)
        raise TrainingError(
            f"step {self._progress.step + 1}: loss {means[0]:g} + {means[1]:g} or its gradient is "
            f"not finite, on sequences {indices} ({cause}); "
            + (f"the last good state is {kept}" if kept else "no state had been saved yet")
        )

    # --- state ------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        layer = self._config.layer
        sizes = f"{self._config.arch} {self._config.target_fingerprint} {layer.intermediate_size}"
        return {
            "drafter": sizes,
            "data": _hash([self._data.content_hash, *map(int, self._data.train)]),
            "num_processes": self._accelerator.num_processes,
            "mixed_precision": str(self._accelerator.mixed_precision),
            **self._options.fixed(),
        }

    def _find_state(self, is_restart: bool) -> Path | None:
        """The state to take up, if any; refuses to write over what is not this run's."""
        state = latest_state(self._out)
        if is_restart:
            self._accelerator.wait_for_everyone()
            if self._accelerator.is_main_process:
                remove_states(self._out)
            self._accelerator.wait_for_everyone()
            return None
        if state is None:
            if (self._out / "config.json").exists():
                raise ValueError(f"out: {self._out} already holds a model; --restart replaces it")
            return None
        run, mine = read_run(state), self._identity()
        for name, value in mine.items():
            if run["identity"].get(name) != value:
                raise ValueError(
                    f"out: {self._out} holds an unfinished run with {name} "
                    f"{run['identity'].get(name)}, not {value}; --restart begins anew"
                )
        return state

    def _prepare(self, model: DraftModel) -> tuple[Any, Any]:
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
        if self._state is None:
            return
        self._accelerator.load_state(str(self._state))
        self._progress = _Progress(**read_run(self._state)["progress"])
        reporter.say(f"going on from step {self._progress.step}")

    def _save(self, reporter: Reporter) -> None:
        if any(not bool(torch.isfinite(p).all()) for p in self._model.parameters()):
            raise TrainingError(f"step {self._progress.step}: a weight is not finite; not saved")
        accelerator = self._accelerator
        path = write_state(
            self._out,
            self._progress.step,
            {"identity": self._identity(), "progress": asdict(self._progress)},
            lambda folder: accelerator.save_state(str(folder)),
            is_main=accelerator.is_main_process,
            wait=accelerator.wait_for_everyone,
        )
        self._saved_at = time.monotonic()
        reporter.say(f"saved {path}")

    def _is_save_due(self) -> bool:
        every, step = self._options.save_steps, self._progress.step
        is_step = every is not None and step > 0 and step % every == 0
        return is_step or time.monotonic() - self._saved_at > 60.0 * self._options.save_minutes

    def _is_time_up(self) -> bool:
        limit = self._options.max_minutes
        return limit is not None and self._progress.seconds >= 60.0 * limit

    def _on_signal(self, number: int) -> None:
        self._signal = number

    # --- the end ----------------------------------------------------------------------------------

    def _finish(self, reporter: Reporter) -> dict[str, Any]:
        """Write the drafter and its summary."""
        accelerator = self._accelerator
        tensors = accelerator.get_state_dict(self._model)
        summary: dict[str, Any] = {}
        if accelerator.is_main_process:
            dtype = SAVE_DTYPES[self._options.save_dtype]
            stored = {key: tensor.to(dtype).cpu() for key, tensor in tensors.items()}
            summary = self._summary(stored)
            brief = {key: value for key, value in summary.items() if key != "history"}
            layer = replace(self._config.layer, dtype=dtype)
            extra = {**self._config.extra, "training": brief}
            write_checkpoint(self._out, replace(self._config, layer=layer, extra=extra), stored)
            text = json.dumps(summary, indent=2) + "\n"
            (self._out / SUMMARY_FILE).write_text(text, encoding="utf-8")
            remove_states(self._out)
        accelerator.wait_for_everyone()
        return summary

    def _summary(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        progress, options = self._progress, self._options
        model = DraftModel(self._config).requires_grad_(False)
        model.load_state_dict(tensors)
        acceptance = chain_acceptance(
            model.to(self._accelerator.device),
            self._full_target.to(self._accelerator.device, torch.float32),
            self._data.source,
            self._data.held_out,
            options.depth,
        )
        return {
            "arch": self._config.arch,
            "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
            "num_steps": progress.step,
            "num_epochs": progress.step / self._plan.steps_per_epoch,
            "num_sequences": len(self._data.train),
            "num_tokens": progress.num_tokens,
            "seconds": progress.seconds,
            "tokens_per_second": progress.num_tokens / max(progress.seconds, 1e-9),
            "peak_memory_bytes": _peak_memory(self._accelerator.device),
            "num_processes": self._accelerator.num_processes,
            "mixed_precision": str(self._accelerator.mixed_precision),
            "options": asdict(options),
            "held_out": acceptance.as_dict(),
            "history": progress.history,
        }


def _hash(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _has_fast_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process's resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def _caught_signals(on_signal: Any) -> Iterator[None]:
    """Let SIGINT and SIGTERM ask for a stop between steps; the second one acts as ever."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        on_signal(number)
        for each, old in before.items():
            signal.signal(each, old)

    try:
        for number in numbers:
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread, which alone may do this
        before = {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
