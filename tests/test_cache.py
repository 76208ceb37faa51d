"""Lengths as the host counts them, and what drafters keep of the batch that ran last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specrt.cache import LastBatch, may_be_reused
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


def test_tables_on_their_way_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a GPU may read late is copied into pinned memory first."""
    table, pinned = torch.arange(3), torch.arange(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned)
    assert may_be_reused(table, torch.device("cuda", 0)) is pinned
    assert may_be_reused(table, torch.device("cpu")) is table


@pytest.mark.gpu
def test_a_table_that_is_written_again_at_once() -> None:
    device, busy = torch.device("cuda"), torch.randn(8192, 8192, device="cuda")
    arrived = []
    for i in range(100):
        busy = busy @ busy  # the copies wait behind it
        table = torch.full((64,), i, dtype=torch.int32)
        arrived.append(may_be_reused(table, device).to(device, non_blocking=True))
        table.fill_(-1)
    assert all(bool((there == i).all()) for i, there in enumerate(arrived))
