"""Samples for the trainer: tokens, mask and the target's features, computed when asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from specrt.train.data.dataset import Dataset
from specrt.train.device import TrainDevice
from specrt.train.features.frozen import FrozenTarget, load_frozen_target, passes
from specrt.types import CheckpointError


class Sample(NamedTuple):
    """One sequence of n tokens and what the target makes of them."""

    token_ids: torch.Tensor
    """``[n]`` int64"""
    loss_mask: torch.Tensor
    """``[n]`` bool"""
    features: torch.Tensor
    """``[n, (T + 1) * H]`` float32, or the lower precision they were computed or stored in: at each
    token the outputs of the T layers the source taps, in their order, then the hidden state after
    the final norm."""


class FeatureSource(Protocol):
    """Where samples come from."""

    @property
    def hidden_size(self) -> int:
        """H"""
        ...

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices, in their order."""
        ...


class OnlineFeatures:
    """Runs the frozen target on every batch asked for.

    Args:
        examples: the data.
        target_path: the target's directory.
        dtype: of the target's weights; the checkpoint's by default.
        device: where the target is put and features are left.
        taps, adapter: as for :func:`load_frozen_target`.
    """

    def __init__(
        self,
        examples: Dataset,
        target_path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        taps: tuple[int, ...] = (),
        adapter: str | os.PathLike[str] | None = None,
    ) -> None:
        self._examples = examples
        self._target: FrozenTarget = load_frozen_target(target_path, dtype, device, taps, adapter)

    @property
    def hidden_size(self) -> int:
        """H"""
        return self._target.config.hidden_size

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return self._examples.lengths

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices; tokens and masks on the CPU, features where the target is.

        Raises:
            ValueError: an example does not fit the target's vocabulary or context.
        """
        if not indices:
            return []
        examples = [self._examples[index] for index in indices]
        features = self._target.features([example.token_ids for example in examples])
        return [Sample(*example, rows) for example, rows in zip(examples, features, strict=True)]


class HeldFeatures:
    """Features computed once, before training, and held where the target computed them.

    Args:
        examples: the data.
        target_path: the target's directory.
        device: where.
        taps, adapter: as for :func:`load_frozen_target`.
        features_dtype: what is held.

    Raises:
        CheckpointError: the target is broken or gives NaN.
        ValueError: an example does not fit the target's vocabulary or context.
    """

    def __init__(
        self,
        examples: Dataset,
        target_path: str | os.PathLike[str],
        device: TrainDevice,
        taps: tuple[int, ...] = (),
        adapter: str | os.PathLike[str] | None = None,
        features_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._examples = examples
        target = load_frozen_target(target_path, None, device.place, taps, adapter)
        self.hidden_size = target.config.hidden_size
        self._rows: list[torch.Tensor] = []
        for part in passes(self.lengths, device.pass_tokens):
            sequences = [examples[i].token_ids for i in range(part.start, part.stop)]
            # Copied, or they would keep the padding of the pass.
            self._rows += [r.to(features_dtype, copy=True) for r in target.features(sequences)]
        good = torch.stack([torch.isfinite(rows).all() for rows in self._rows])
        if bad := [i for i, is_good in enumerate(device.memory.read(good)) if not is_good]:
            raise CheckpointError(f"{target_path}: NaN or infinite features of example {bad[0]}")

    @staticmethod
    def num_bytes(examples: Dataset, hidden_size: int, num_taps: int) -> int:
        """What the features of data take."""
        return 2 * sum(examples.lengths) * hidden_size * (num_taps + 1)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return self._examples.lengths

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices; tokens and masks on the CPU, features where they are."""
        return [Sample(*self._examples[index], self._rows[index]) for index in indices]


class FeatureSubset:
    """Some samples of another source, under indices of their own.

    Args:
        source: the whole.
        indices: which of its samples, in which order.
    """

    def __init__(self, source: FeatureSource, indices: Sequence[int]) -> None:
        self._source = source
        self._indices = list(indices)

    @property
    def hidden_size(self) -> int:
        """H"""
        return self._source.hidden_size

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        lengths = self._source.lengths
        return [lengths[index] for index in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices, in their order."""
        return self._source.batch([self._indices[index] for index in indices])
