"""Which sequences go into which step, and how they become one padded batch.

Order and noise are functions of (seed, epoch, sequence) alone: a run that was killed, or is split
over processes, sees what an undisturbed one sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specrt.device import Device
from specrt.train.features.source import FeatureSource, Sample
from specrt.train.losses import counted_positions

_WINDOW = 32  # batches sorted by length together: enough for little padding, still well mixed
_NOISE_LENGTH = 512  # noise is scaled by this over a sequence's length, as in EAGLE
_ORDER, _NOISE, _DRAWS = 0, 1, 2  # purposes of random numbers


@dataclass(frozen=True)
class _Batch:
    """B sequences padded at the end to m positions; tensors lie where training runs, but for the
    mask."""

    indices: tuple[int, ...]
    """``[B]``"""
    is_counted: torch.Tensor
    """``[B, m]`` bool, on the host: the positions whose losses count."""
    counted: torch.Tensor
    """``[N]`` int64: those positions, as indices of ``[B * m]``."""
    num_tokens: int
    """Without padding."""

    @property
    def num_counted(self) -> int:
        """N"""
        return len(self.counted)


@dataclass(frozen=True)
class Batch(_Batch):
    """Sequences of pairs; H is the hidden size. Position t counts where token t + 2 is to be
    predicted."""

    inputs: torch.Tensor
    """``[B, m, H]`` float32: f_t with noise."""
    next_tokens: torch.Tensor
    """``[B, m]`` int64: token t + 1."""
    targets: torch.Tensor
    """``[B, m, H]``: f_{t+1}, in the dtype it came in."""

    def bad_rows(self) -> list[int]:
        """The sequences whose features are not finite."""
        is_good = (torch.isfinite(self.inputs) & torch.isfinite(self.targets)).all(-1).all(-1)
        return [i for i, good in zip(self.indices, is_good.tolist(), strict=True) if not good]


class BatchPlan:
    """The sequences of every step.

    Each epoch shuffles the sequences and sorts windows of them by length, so that a batch's are
    of like length; then it shuffles the batches. What does not fill a batch is left out for that
    epoch.

    Args:
        indices: the sequences to train on.
        lengths: of all sequences, by index.
        batch_size: B; fewer where there are fewer sequences.
        seed: of the order.
    """

    def __init__(
        self, indices: Sequence[int], lengths: Sequence[int], batch_size: int, seed: int
    ) -> None:
        self._indices = np.asarray(indices)
        self._lengths = np.asarray(lengths)
        self._seed = seed
        self.batch_size = min(batch_size, len(indices))
        self.steps_per_epoch = len(indices) // self.batch_size
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def step(self, step: int) -> tuple[int, list[int]]:
        """The epoch and the B sequences of step ``step``, both counted from 0."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return epoch, self._epoch[1][number]

    def _batches(self, epoch: int) -> list[list[int]]:
        random = np.random.Generator(np.random.Philox(_key(self._seed, _ORDER, epoch, 0)))
        order = random.permutation(self._indices)
        order = order[: self.steps_per_epoch * self.batch_size]
        window = _WINDOW * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches += part.reshape(-1, self.batch_size).tolist()
        return [batches[i] for i in random.permutation(len(batches))]


def collate(
    source: FeatureSource,
    indices: Sequence[int],
    *,
    noise: float,
    seed: int,
    epoch: int,
    device: Device,
) -> Batch:
    """Read sequences and pad them to the longest.

    Args:
        source: of the samples.
        indices: the B sequences.
        noise: width of the uniform noise on input features, for sequences of 512 tokens; inversely
            proportional to a sequence's length.
        seed, epoch: what the noise depends on, beside the sequence and the kind of device.
        device: of the batch.
    """
    samples = source.batch(indices)
    lengths = [len(sample.token_ids) for sample in samples]
    shape = (len(samples), max(1, max(lengths) - 2))
    next_tokens = torch.zeros(shape, dtype=torch.int64)
    is_counted = torch.zeros(shape, dtype=torch.bool)
    for row, (length, sample) in enumerate(zip(lengths, samples, strict=True)):
        if length > 2:
            next_tokens[row, : length - 2] = sample.token_ids[1:-1]
            is_counted[row, : length - 2] = counted_positions(sample.loss_mask)
    features = _padded(samples, shape[1] + 1, device)
    inputs, targets = features[:, :-1].float(), features[:, 1:]
    if noise:
        seeds = [_key(seed, _NOISE, epoch, index) for index in indices]
        added = feature_noise(seeds, lengths, source.hidden_size, noise, device)
        inputs = inputs + added[:, : shape[1]]
    is_padding = torch.arange(shape[1]) >= torch.tensor(lengths)[:, None] - 2
    inputs = inputs.masked_fill(device.there(is_padding)[..., None], 0.0)
    return Batch(
        tuple(indices),
        is_counted,
        device.there(is_counted.flatten().nonzero()[:, 0]),
        sum(lengths),
        inputs,
        device.there(next_tokens),
        targets,
    )


@dataclass(frozen=True)
class ExitBatch(_Batch):
    """Sequences with the outputs of T tapped layers; H is the hidden size. Position t counts where
    token t + 1 is to be predicted."""

    states: torch.Tensor
    """``[B, m, T + 1, H]`` float32: what the tapped layers give for token t, then its feature."""
    draw_seeds: tuple[int, ...]
    """``[B]``: of the noise that samples the tokens of each sequence."""

    def bad_rows(self) -> list[int]:
        """The sequences whose features are not finite."""
        is_good = torch.isfinite(self.states).flatten(1).all(-1)
        return [i for i, good in zip(self.indices, is_good.tolist(), strict=True) if not good]


def collate_exits(
    source: FeatureSource,
    indices: Sequence[int],
    *,
    seed: int,
    epoch: int,
    device: Device,
) -> ExitBatch:
    """Read sequences with tapped layers and pad them to the longest.

    Args:
        source: of the samples.
        indices: the B sequences.
        seed, epoch: what the draws depend on, beside the sequence.
        device: of the batch.
    """
    samples = source.batch(indices)
    lengths = [len(sample.token_ids) for sample in samples]
    num_positions = max(1, max(lengths) - 1)
    width = samples[0].features.shape[1] // source.hidden_size
    is_counted = torch.zeros(len(samples), num_positions, dtype=torch.bool)
    for row, (length, sample) in enumerate(zip(lengths, samples, strict=True)):
        is_counted[row, : length - 1] = sample.loss_mask[1:]
    states = _padded(samples, num_positions, device).unflatten(2, (width, -1)).float()
    return ExitBatch(
        tuple(indices),
        is_counted,
        device.there(is_counted.flatten().nonzero()[:, 0]),
        sum(lengths),
        states,
        tuple(_key(seed, _DRAWS, epoch, index) for index in indices),
    )


def _padded(samples: Sequence[Sample], num_rows: int, device: Device) -> torch.Tensor:
    """``[B, num_rows, W]``: each sample's features but the last, then zeros.

    Put together where they lie, so that those of the host go up in one copy, in their own dtype.
    """
    first = samples[0].features
    padded = first.new_zeros(len(samples), num_rows, first.shape[1])
    for row, sample in enumerate(samples):
        padded[row, : len(sample.features) - 1] = sample.features[:-1]
    return device.there(padded)


def feature_noise(
    seeds: Sequence[int], lengths: Sequence[int], hidden_size: int, width: float, device: Device
) -> torch.Tensor:
    """``(rand - 0.5) * width * 512 / length``, as EAGLE's.

    Args:
        seeds: of B sequences.
        lengths: of theirs.
        hidden_size: H
        width: for sequences of 512 tokens.
        device: where it is made; another kind of device makes other numbers.

    Returns:
        ``[B, m, H]`` float32; what lies behind a sequence's length is anything.
    """
    noise = device.empty(len(seeds), max(lengths), hidden_size)
    random = torch.Generator(device.place)
    for rows, seed, length in zip(noise, seeds, lengths, strict=True):
        rows[:length].uniform_(generator=random.manual_seed(seed))
    widths = torch.tensor([width * _NOISE_LENGTH / length for length in lengths])
    return noise.sub_(0.5).mul_(device.there(widths)[:, None, None])


def _key(seed: int, purpose: int, epoch: int, index: int) -> int:
    """A seed that is a pure function of the four and differs wherever one of them does."""
    words = np.random.SeedSequence([seed, purpose, epoch, index]).generate_state(1, np.uint32)
    return int(words[0])
