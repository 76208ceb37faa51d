"""Which sequences go into which step, and how they become one padded batch.

Order and noise are functions of (seed, epoch, sequence) alone: a run that was killed, or is split
over processes, sees what an undisturbed one sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specrt.train.features.source import FeatureSource
from specrt.train.losses import counted_positions

_WINDOW = 32  # batches sorted by length together: enough for little padding, still well mixed
_NOISE_LENGTH = 512  # noise is scaled by this over a sequence's length, as in EAGLE
_ORDER, _NOISE, _DRAWS = 0, 1, 2  # purposes of random numbers


@dataclass(frozen=True)
class Batch:
    """B sequences of m pairs, padded at the end; H is the hidden size."""

    indices: tuple[int, ...]
    """``[B]``"""
    inputs: torch.Tensor
    """``[B, m, H]`` float32: f_t with noise."""
    next_tokens: torch.Tensor
    """``[B, m]`` int64: token t + 1."""
    targets: torch.Tensor
    """``[B, m, H]`` float32: f_{t+1}."""
    is_counted: torch.Tensor
    """``[B, m]`` bool: token t + 2 is to be predicted."""
    num_tokens: int
    """Without padding."""

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
    device: torch.device,
) -> Batch:
    """Read sequences and pad them to the longest.

    Args:
        source: of the samples.
        indices: the B sequences.
        noise: width of the uniform noise on input features, for sequences of 512 tokens; inversely
            proportional to a sequence's length.
        seed, epoch: what the noise depends on, beside the sequence.
        device: of the batch.
    """
    samples = source.batch(indices)
    num_pairs = max(1, max(len(sample.token_ids) for sample in samples) - 2)
    shape = (len(samples), num_pairs)
    inputs = torch.zeros(*shape, source.hidden_size, device=device)
    targets = torch.zeros_like(inputs)
    next_tokens = torch.zeros(shape, dtype=torch.int64)
    is_counted = torch.zeros(shape, dtype=torch.bool)
    for row, (index, sample) in enumerate(zip(indices, samples, strict=True)):
        length = len(sample.token_ids)
        if length < 3:
            continue
        part = (row, slice(length - 2))
        features = sample.features.to(device)
        inputs[part] = features[:-2]
        targets[part] = features[1:-1]
        if noise:
            random = torch.Generator(device).manual_seed(_key(seed, _NOISE, epoch, index))
            inputs[part] += feature_noise(random, length, source.hidden_size, noise)[:-2]
        next_tokens[part] = sample.token_ids[1:-1]
        is_counted[part] = counted_positions(sample.loss_mask)
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    return Batch(
        tuple(indices), inputs, next_tokens.to(device), targets, is_counted.to(device), num_tokens
    )


@dataclass(frozen=True)
class ExitBatch:
    """B sequences of m positions, padded at the end; T tapped layers, H the hidden size."""

    indices: tuple[int, ...]
    """``[B]``"""
    states: torch.Tensor
    """``[B, m, T + 1, H]`` float32: what the tapped layers give for token t, then its feature."""
    is_counted: torch.Tensor
    """``[B, m]`` bool: token t + 1 is to be predicted."""
    draw_seeds: tuple[int, ...]
    """``[B]``: of the noise that samples the tokens of each sequence."""
    num_tokens: int
    """Without padding."""

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
    device: torch.device,
) -> ExitBatch:
    """Read sequences with tapped layers and pad them to the longest.

    Args:
        source: of the samples.
        indices: the B sequences.
        seed, epoch: what the draws depend on, beside the sequence.
        device: of the batch.
    """
    samples = source.batch(indices)
    num_positions = max(1, max(len(sample.token_ids) for sample in samples) - 1)
    width = samples[0].features.shape[1] // source.hidden_size
    shape = (len(samples), num_positions)
    states = torch.zeros(*shape, width, source.hidden_size, device=device)
    is_counted = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        part = (row, slice(len(sample.token_ids) - 1))
        states[part] = sample.features[:-1].to(device).unflatten(1, (width, -1)).float()
        is_counted[part] = sample.loss_mask[1:]
    seeds = tuple(_key(seed, _DRAWS, epoch, index) for index in indices)
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    return ExitBatch(tuple(indices), states, is_counted.to(device), seeds, num_tokens)


def feature_noise(
    random: torch.Generator, length: int, hidden_size: int, width: float
) -> torch.Tensor:
    """``[length, H]`` float32: ``(rand - 0.5) * width * 512 / length``, as EAGLE's."""
    values = torch.rand(length, hidden_size, generator=random, device=random.device)
    return values.sub_(0.5).mul_(width * _NOISE_LENGTH / length)


def _key(seed: int, purpose: int, epoch: int, index: int) -> int:
    """A seed that is a pure function of the four and differs wherever one of them does."""
    words = np.random.SeedSequence([seed, purpose, epoch, index]).generate_state(1, np.uint32)
    return int(words[0])
