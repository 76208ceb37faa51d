"""Lengths as the host counts them, and what drafters keep of the batch that ran last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specrt.cache import SCRATCH_PAGE, CacheBatch, LastBatch, may_be_reused
from specrt.tree import chain_tree
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


def test_pages_that_are_given_back_twice_are_had_once(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    cache = make_model(tmp_path).new_cache()
    first, second = cache.open(100), cache.open(100)
    cache.close(first)
    cache.close(first)
    assert cache.num_free_pages == 2
    others = [cache.open(100), cache.open(100)]
    held = [page for one in (second, *others) for page in one.pages]
    assert len(held) == len(set(held)) == 6
    cache.close(first)  # whose pages are somebody else's by now
    assert cache.num_free_pages == 0


def test_what_a_table_does_not_use_is_nobodys_page(tmp_path: Path) -> None:
    """Rows that a drafter writes past a sequence's pages change no neighbour's."""
    make_checkpoint("llama", tmp_path)
    model = make_model(tmp_path)
    cache = model.new_cache(page_size=4)
    sequences = [cache.open(8), cache.open(12)]
    batch = CacheBatch(cache, sequences)
    table = batch.block_table.tolist()
    assert table[0][2:] == [SCRATCH_PAGE] * 6 and table[1][3:] == [SCRATCH_PAGE] * 5
    assert SCRATCH_PAGE not in (page for one in sequences for page in one.pages)
    before = cache.kv[:, :, sequences[1].pages].clone()
    tokens = torch.zeros(1, 30, dtype=torch.int32)  # of a sequence that has room for 8
    model.forward(chain_tree(tokens), CacheBatch(cache, sequences[:1]))
    assert torch.equal(cache.kv[:, :, sequences[1].pages], before)
    assert cache.kv[:, :, sequences[0].pages].any()
    cache.close(sequences[0])
    assert set(CacheBatch(cache, sequences[:1]).block_table.flatten().tolist()) == {SCRATCH_PAGE}


def test_memory_that_is_in_use_is_not_given_back(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    cache = make_model(tmp_path).new_cache()
    one = cache.open(100)
    cache.retire()
    assert cache.num_pages == 2
    cache.close(one)
    cache.retire()
    assert cache.num_pages == cache.num_free_pages == 0


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
