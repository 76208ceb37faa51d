"""From a target and files of conversations to a drafter: everything ``specrt train`` does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from specrt.config import ModelConfig
from specrt.draft.eesd.checkpoint import ExitConfig
from specrt.draft.fspad.checkpoint import (
    TOKEN_IDS,
    DraftConfig,
    read_checkpoint,
    tensor_shapes,
)
from specrt.draft.fspad.vocabulary import HotTokens, keep_tokens
from specrt.models.loader import load_tables
from specrt.models.opening import adapter_hash, weights_hash
from specrt.models.tokenizer import load_tokenizer
from specrt.train.data.dataset import Dataset, read_examples
from specrt.train.device import TrainDevice
from specrt.train.eesd.module import read_last_layer
from specrt.train.eesd.task import EesdTask
from specrt.train.features.cache import cache_features
from specrt.train.features.source import FeatureSource, HeldFeatures, OnlineFeatures
from specrt.train.fspad.task import INITIAL, FspadTask
from specrt.train.head import TargetHead, TargetTables
from specrt.train.loop.lock import hold_directory
from specrt.train.loop.options import DataOptions, EesdOptions, FspadOptions, TrainOptions
from specrt.train.loop.processes import leave, make_accelerator
from specrt.train.loop.report import Reporter
from specrt.train.loop.state import StateFolder, saved_identity
from specrt.train.loop.trainer import Outcome, Trainer, TrainingError, run_identity
from specrt.train.task import TrainData, TrainTask

ONLINE, MEMORY = "online", "memory"
_FEATURES_FOLDER = "features"
_LOG_FOLDER = "tensorboard"
_MAX_SHOWN = 16  # tokens of a sequence that an error names


@dataclass(frozen=True)
class TrainJob:
    """What to train, on what, and where to put it."""

    target: Path
    """A Hugging Face directory."""
    target_name: str
    """What the checkpoint calls it."""
    files: tuple[Path, ...]
    """Of conversations."""
    out: Path
    data: DataOptions = field(default_factory=DataOptions)
    write_files: Callable[[], None] | None = None
    """Makes ``files`` first, in the main process alone."""
    is_restart: bool = False
    adapter: Path | None = None
    """A directory with a LoRA adapter that is merged into the target."""


def train_fspad(
    job: TrainJob,
    options: FspadOptions,
    *,
    arch: str = "fspad",
    intermediate_size: int | None = None,
    hot_tokens: HotTokens | None = None,
    draft_vocab: int | None = None,
    initial: Path | None = None,
) -> Outcome:
    """Train FSPAD, EAGLE-2 or one between them and write it to ``job.out``.

    Args:
        job, options: what and how.
        arch: a key of :data:`specrt.draft.fspad.checkpoint.ARCHS`.
        intermediate_size: I; the target's by default.
        hot_tokens: the only tokens it learns to propose; the losses compare laws over these alone.
        draft_vocab: the first so many of them; None: all.
        initial: a drafter to begin with, of the same shape; its own list of tokens is not taken.
            One that is gone by the time its run goes on is not missed: the state has everything.

    Raises:
        As :func:`train`; ValueError also for an unknown ``arch``, for ``hot_tokens`` as
        :func:`specrt.draft.fspad.vocabulary.keep_tokens`, and for an ``initial`` of another shape.
    """
    target = _config(job)
    config = DraftConfig.for_target(
        target, arch, name=job.target_name, intermediate_size=intermediate_size
    )
    config = replace(config, target_adapter=adapter_hash(job.adapter))
    kept: Mapping[str, torch.Tensor] = {}
    if draft_vocab is not None and not 1 <= draft_vocab <= target.vocab_size:
        raise ValueError(f"draft_vocab: expected 1..{target.vocab_size}, got {draft_vocab}")
    if hot_tokens is not None:
        config, kept = keep_tokens(config, {}, hot_tokens, draft_vocab)
    token_ids = kept[TOKEN_IDS].long() if kept else None
    begun_with = None
    start: Mapping[str, torch.Tensor] | str | None = None
    if initial is not None:
        is_there = (initial / "config.json").exists()
        begun_with = None if is_there or job.is_restart else initial_of_run(job.out)
        start = begun_with or _initial(initial, config, target)
    task = FspadTask(config, lambda: _tables(job, target), options, token_ids, start)
    return train(job, options, task, must_go_on=begun_with is not None)


def initial_of_run(out: Path) -> str | None:
    """What tells the drafter that the unfinished run in a directory began with; None: there is no
    such run, or it began with none.

    Raises:
        CheckpointError: the state there is damaged; names the file.
    """
    said = saved_identity(out).get(INITIAL)
    return said if isinstance(said, str) else None


def _initial(
    directory: Path, config: DraftConfig, target: ModelConfig
) -> Mapping[str, torch.Tensor]:
    """Another drafter's weights, if its shape is that of the one to train."""
    found, tensors = read_checkpoint(directory, target)
    wanted = tensor_shapes(config)
    if tensor_shapes(found) != wanted:
        shapes = [f"{c.arch} with MLPs of {c.layer.intermediate_size}" for c in (config, found)]
        raise ValueError(f"{directory}: expected {shapes[0]}, got {shapes[1]}")
    return {
        key: tensors[key] if key in tensors else torch.zeros(shape) for key, shape in wanted.items()
    }


def train_eesd(job: TrainJob, options: EesdOptions, exit_layers: Sequence[int]) -> Outcome:
    """Train exits after several N side by side and write them to ``job.out``.

    Args:
        job, options: what and how.
        exit_layers: every N, 1..L-1.

    Raises:
        As :func:`train`; ValueError also for no N, or one out of range.
    """
    if not exit_layers:
        raise ValueError("exit_layer: expected at least one")
    target, adapter = _config(job), adapter_hash(job.adapter)
    configs = [
        replace(ExitConfig.for_target(target, number, name=job.target_name), target_adapter=adapter)
        for number in sorted(set(exit_layers))
    ]
    task = EesdTask(
        target,
        configs,
        lambda: _tables(job, target),
        lambda: read_last_layer(job.target, target, job.adapter),
        options,
    )
    return train(job, options, task)


def train(
    job: TrainJob, options: TrainOptions, task: TrainTask, *, must_go_on: bool = False
) -> Outcome:
    """Train what a task describes, from files to a checkpoint.

    Args:
        job, options, task: what and how.
        must_go_on: whether the task cannot begin, but only take up a state.

    Raises:
        CheckpointError: the target, or cached features, are missing, broken or do not belong.
        ValueError: bad data, an option out of range or at odds with an earlier run in ``out``, or
            another process at work there.
        TrainingError: the loss is not finite, or a GPU's memory is not enough.
        OSError: a file cannot be read or written.
    """
    accelerator = make_accelerator(options)
    # The main process holds it for all of its run's.
    with hold_directory(job.out) if accelerator.is_main_process else nullcontext():
        try:
            outcome = _train(job, options, task, accelerator, must_go_on)
        except torch.OutOfMemoryError as error:
            raise TrainingError(_smaller(job, options, accelerator, error)) from error
    leave(accelerator)
    return outcome


def _smaller(
    job: TrainJob, options: TrainOptions, accelerator: Accelerator, error: Exception
) -> str:
    """What would take less of a GPU's memory."""
    said = str(error).strip().splitlines()
    return (
        f"out of memory on {accelerator.device}: lower --batch ({options.batch_size}) or "
        f"--max-length ({job.data.max_length}), raise --accumulate ({options.accumulation_steps}), "
        f"or keep features on disk (--features DIRECTORY); torch says: {said[0] if said else ''}"
    )


def _train(
    job: TrainJob,
    options: TrainOptions,
    task: TrainTask,
    accelerator: Accelerator,
    must_go_on: bool,
) -> Outcome:
    target = _config(job)
    log_dir = job.out / _LOG_FOLDER if options.tensorboard else None
    with Reporter(accelerator.is_main_process, log_dir) as reporter:
        tokenizer = load_tokenizer(job.target)
        if job.write_files is not None:
            with accelerator.main_process_first():
                if accelerator.is_main_process:
                    job.write_files()
        max_length = min(job.data.max_length, target.max_positions)
        dataset = read_examples(
            job.files, tokenizer, max_length=max_length, skip_bad=job.data.skip_bad
        )
        for line in dataset.report.lines():
            reporter.say(line)
        train, held_out = dataset.split(job.data.held_out)
        is_online = _is_online(job, options, len(train))
        identity = {
            # Said before what follows from them.
            "max_length": max_length,
            "held_out": job.data.held_out,
            **run_identity(task, options, accelerator, dataset.content_hash, train),
            "target_weights": weights_hash(job.target, job.adapter),
            "features": ONLINE if is_online else "cached",  # in fewer bits
        }
        state = StateFolder(job.out, identity, accelerator)
        state.claim(is_restart=job.is_restart)  # before the long work on features
        if must_go_on and state.latest() is None:  # another process's end came between
            raise ValueError(f"init: it is gone, and so is the state of the run in {job.out}")

        def describe(index: int) -> str:
            beginning = tokenizer.decode(dataset[index].token_ids[:_MAX_SHOWN].tolist())
            return f"{index} ({beginning!r} ...)"

        source = _features(job, task.taps, dataset, accelerator, is_online=is_online)
        data = TrainData(source, train, held_out, describe)
        trainer = Trainer(task, data, options, out=job.out, state=state, accelerator=accelerator)
        outcome = trainer.run(reporter)
    if outcome.is_done and accelerator.is_main_process:
        shutil.rmtree(job.out / _FEATURES_FOLDER, ignore_errors=True)
    return outcome


def _config(job: TrainJob) -> ModelConfig:
    return ModelConfig.from_directory(job.target, adapter=job.adapter)


def _tables(job: TrainJob, target: ModelConfig) -> TargetTables:
    loaded = load_tables(job.target, target, torch.float32, job.adapter)
    embed, weight, form = loaded.embed, loaded.lm_head, target.form
    assert isinstance(embed, torch.Tensor), "rows"
    assert isinstance(weight, torch.Tensor), "rows"
    head = TargetHead(weight, loaded.head_bias, form.logit_scale, form.logit_cap)
    return TargetTables(embed, head)


def _is_online(job: TrainJob, options: TrainOptions, num_sequences: int) -> bool:
    """Whether features are computed when asked for: as told, else where none is asked for twice."""
    if job.data.features is not None:
        return job.data.features == ONLINE
    steps_per_epoch = max(1, num_sequences // options.batch_size)
    return options.total_steps(steps_per_epoch) <= steps_per_epoch


def _features(
    job: TrainJob,
    taps: tuple[int, ...],
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    is_online: bool,
) -> FeatureSource:
    """The target's features, computed when asked for, or once for all and held or kept on disk."""
    device = TrainDevice.at(accelerator.device)
    if is_online:
        return OnlineFeatures(
            dataset, job.target, device=device.place, taps=taps, adapter=job.adapter
        )
    hidden_size = _config(job).hidden_size
    num_bytes = HeldFeatures.num_bytes(dataset, hidden_size, len(taps))
    is_held = accelerator.num_processes == 1 and num_bytes < device.feature_room
    if job.data.features == MEMORY or (job.data.features is None and is_held):
        return HeldFeatures(dataset, job.target, device, taps, job.adapter)
    folder = Path(job.data.features) if job.data.features else job.out / _FEATURES_FOLDER
    with accelerator.main_process_first():
        return cache_features(
            folder, dataset, job.target, device=device.place, taps=taps, adapter=job.adapter
        )
