"""Lengths as the host counts them, and what drafters keep of the batch that ran last."""

from __future__ import annotations

from pathlib import Path

import torch

from specrt.cache import CacheBatch, LastBatch
from tests.checkpoints import make_checkpoint
from tests.engine.support import make_model


def test_the_last_batch_is_made_anew_only_when_others_run(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    cache = make_model(tmp_path).new_cache()
    one, two = cache.open(10), cache.open(10)
    last = LastBatch(cache)
    batch = last.of([one, two])
    assert last.of([one, two]) is batch
    assert last.of([two, one]) is not batch
    batch = last.of([two])
    one.length = 3  # another sequence's rows are no news
    assert last.of([two]) is batch
    two.length = 5
    last.forget()
    assert last.of([two]).kv_len.tolist() == [5]


def test_the_host_counts_what_the_kernel_commits(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    cache = make_model(tmp_path).new_cache()
    sequences = [cache.open(10) for _ in range(3)]
    batch = CacheBatch(cache, sequences)
    path = torch.arange(2, dtype=torch.int32).repeat(3, 1)
    batch.commit(path, torch.tensor([9, -1, 1], dtype=torch.int32))  # 9 of 2
    assert batch.kv_len.tolist() == [s.length for s in sequences] == [2, 0, 1]
