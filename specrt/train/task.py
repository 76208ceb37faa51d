"""What the loop needs to know of a kind of drafter to train it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from specrt.train.device import TrainDevice
from specrt.train.features.source import FeatureSource


@dataclass(frozen=True)
class TrainData:
    """Sequences with features, and which of them are for what."""

    source: FeatureSource
    train: Sequence[int]
    held_out: Sequence[int]
    describe: Callable[[int], str] = str
    """What errors call a sequence."""


class TaskBatch(Protocol):
    """Some sequences as a task collated them."""

    @property
    def num_counted(self) -> int:
        """Positions whose losses count."""
        ...

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        ...

    def bad_rows(self) -> list[int]:
        """The sequences whose features are not finite."""
        ...


class StepLosses(NamedTuple):
    """Sums over a batch's counted positions."""

    total: torch.Tensor
    """``[]``: what the gradient is taken of."""
    sums: torch.Tensor
    """``[K]`` float32, detached: the task's own list of losses and hits."""


class TrainTask(Protocol):
    """One kind of drafter in training: its module, batches, losses and checkpoint."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose outputs it reads, beside the final feature."""
        ...

    def identity(self) -> dict[str, Any]:
        """JSON values that a run must share with the one it takes up."""
        ...

    def start(self, device: TrainDevice, dtype: torch.dtype) -> nn.Module:
        """The module as training begins; the target's tables go to ``device`` in ``dtype``."""
        ...

    def collate(self, source: FeatureSource, indices: Sequence[int], epoch: int) -> TaskBatch:
        """Read sequences as a batch: a function of its arguments and the seed."""
        ...

    def losses(self, module: Any, batch: Any, *, has_hits: bool) -> StepLosses:
        """Run the module, as ``accelerate`` wrapped it, on a batch it collated."""
        ...

    def num_flop(self, batch: Any) -> int:
        """Of the matrix products of a step's share, forward and back, attention's left out: those
        of the batch's shape, padding included, two for each multiplication and addition."""
        ...

    def clip_groups(self, module: Any) -> list[list[nn.Parameter]]:
        """The parameters, in groups whose gradients are clipped by a norm of their own."""
        ...

    def named(self, means: Sequence[float]) -> dict[str, float]:
        """The means over all counted positions of a step, of ``StepLosses.sums``, as logged.

        ``loss`` is among them.
        """
        ...

    def finish(
        self, out: Path, weights: dict[str, torch.Tensor], data: TrainData, run: dict[str, Any]
    ) -> dict[str, Any]:
        """Try the drafter on the held-out sequences and write it.

        Args:
            out: where to.
            weights: the module's state dict, on the CPU.
            data: of the run.
            run: what the loop has to say of it.

        Returns:
            The whole summary, as written.

        Raises:
            OSError: it cannot be written.
        """
        ...
