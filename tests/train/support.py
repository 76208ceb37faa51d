"""A target of nothing but a table, its sequences in memory, and a trainer for them.

Tokens are drawn at random. The feature at a token is a code of that token alone, and the head
reads from it the token that comes after it in a fixed permutation. So f_{t+1} and its likeliest
next token are known from token t + 1, which a pair holds, and from nothing else.

As a program: ``python -m tests.train.support OUT MAX_STEPS [KILL_AT]`` trains, in one process or in
the several that torchrun started, and kills itself at the batch of number KILL_AT.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from specrt.config import ModelConfig
from specrt.draft.fspad.checkpoint import DraftConfig
from specrt.train.device import TrainDevice
from specrt.train.features.source import Sample
from specrt.train.fspad.module import DraftModel
from specrt.train.fspad.task import FspadTask
from specrt.train.head import TargetHead, TargetTables
from specrt.train.loop.options import FspadOptions
from specrt.train.loop.processes import leave, make_accelerator
from specrt.train.loop.report import Reporter
from specrt.train.loop.state import StateFolder
from specrt.train.loop.trainer import Outcome, Trainer, run_identity
from specrt.train.task import TrainData

HIDDEN, VOCAB = 32, 61
TARGET = ModelConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
)
LITTLE: dict[str, Any] = {
    "batch_size": 4,
    "lr": 3e-3,
    "warmup_steps": 2,
    "precision": "float32",
    "log_steps": 1,
    "save_dtype": "float32",
    "tensorboard": False,
}
"""Of runs that are over at once and exact."""
OPTIONS = FspadOptions(max_steps=8, **LITTLE)


def draft_config(arch: str = "fspad") -> DraftConfig:
    """A drafter for :data:`TARGET`."""
    return DraftConfig.for_target(TARGET, arch, name="table")


def random_model(arch: str, seed: int = 2) -> DraftModel:
    """A frozen drafter in which every part does something, unlike in a new one."""
    model = DraftModel(draft_config(arch)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_matrix = parameter.dim() == 2
        parameter.copy_(noise * parameter.shape[1] ** -0.5 if is_matrix else 1 + 0.2 * noise)
    return model


@dataclass
class MemorySource:
    """Samples in memory; ``on_batch`` is called with the number of batches read before."""

    samples: list[Sample]
    on_batch: Callable[[int], None] = lambda number: None
    num_batches: int = 0
    hidden_size: int = HIDDEN
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [len(sample.token_ids) for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> list[Sample]:
        self.on_batch(self.num_batches)
        self.num_batches += 1
        return [self.samples[index] for index in indices]


def tables(seed: int = 1) -> TargetTables:
    """An embedding, and a head that reads the permuted token from its code."""
    generator = torch.Generator().manual_seed(seed)
    embed = torch.randn(VOCAB, HIDDEN, generator=generator)
    order = torch.randperm(VOCAB, generator=generator)
    return TargetTables(embed, TargetHead(0.3 * _codes(seed)[order]))


def make_source(num_samples: int = 24, *, shift: int = 0, seed: int = 1) -> MemorySource:
    """Random sequences of 6 to 25 tokens; features come ``shift`` positions early."""
    generator = torch.Generator().manual_seed(seed + 1)
    codes, samples = _codes(seed), []
    for number in range(num_samples):
        token_ids = torch.randint(0, VOCAB, (6 + number % 20,), generator=generator)
        loss_mask = torch.arange(len(token_ids)) >= 2
        samples.append(Sample(token_ids, loss_mask, codes[token_ids.roll(-shift)]))
    return MemorySource(samples)


def make_trainer(
    out: Path,
    options: FspadOptions = OPTIONS,
    source: MemorySource | None = None,
    arch: str = "fspad",
    device: TrainDevice | None = None,
    **given: Any,
) -> Trainer:
    """A trainer on all but the last two sequences; ``given`` goes to ``StateFolder.claim``."""
    source = source or make_source()
    accelerator = make_accelerator(options)
    task = FspadTask(draft_config(arch), tables, options)
    train = range(len(source) - 2)
    identity = run_identity(task, options, accelerator, "table", train)
    state = StateFolder(out, identity, accelerator)
    state.claim(**given)
    data = TrainData(source, train, range(len(source) - 2, len(source)))
    run = {"out": out, "state": state, "accelerator": accelerator, "device": device}
    return Trainer(task, data, options, **run)


def train(out: Path, options: FspadOptions = OPTIONS, **given: Any) -> Outcome:
    """Run a trainer, silently."""
    with Path(os.devnull).open("w") as sink, Reporter(True, None, Console(file=sink)) as reporter:
        outcome = make_trainer(out, options, **given).run(reporter)
    leave(Accelerator())  # they share their state
    return outcome


def curve(outcome: Outcome) -> list[tuple[float, ...]]:
    """What each step logged, bar the time it took."""
    return [
        tuple(value for name, value in entry.items() if name != "tokens_per_second")
        for entry in outcome.summary["history"]
    ]


def _codes(seed: int) -> torch.Tensor:
    return 3.0 * torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(seed + 7))


def _main(out: str, max_steps: str, kill_at: str = "-1") -> None:
    def kill(number: int) -> None:
        if number == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    source = make_source()
    source.on_batch = kill
    options = FspadOptions(**{**vars(OPTIONS), "max_steps": int(max_steps), "save_steps": 2})
    train(Path(out), options, source=source)


if __name__ == "__main__":
    _main(*sys.argv[1:])
