"""A data set of random tokens, and how far features are from one another."""

from __future__ import annotations

import torch

from specrt.train.data.dataset import DataReport, Dataset

LENGTHS = (5, 1, 140, 17, 30, 8, 64, 2)
VOCAB = 97


def make_dataset(*, vocab: int = VOCAB, seed: int = 0, max_length: int = 140) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    offsets = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
    return Dataset(
        token_ids=torch.randint(vocab, (total,), generator=generator, dtype=torch.int32),
        loss_mask=torch.rand(total, generator=generator) < 0.5,
        offsets=offsets,
        max_length=max_length,
        report=DataReport(),
    )


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, of the worst row."""
    got, wanted = got.float(), wanted.float()
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
