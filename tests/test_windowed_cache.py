"""Layers that see a window: what of their pages is kept, given back, and had by others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from specrt.cache import SCRATCH_PAGE, CacheBatch, CachedSequence, KVCache
from specrt.config import Form, LayerKind, ModelConfig
from specrt.pages import PageGroup
from tests.interrupts import interrupted

WINDOWS = (None, 5, 5, 11, None, 5)


@pytest.fixture(scope="module")
def llama() -> ModelConfig:
    llama = {
        "model_type": "llama",
        "vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6,
        "num_attention_heads": 1, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return ModelConfig.from_dict(llama, source="test")


def windowed(config: ModelConfig, windows: Sequence[int | None]) -> ModelConfig:
    layers = tuple(LayerKind(window) for window in windows)
    return replace(config, num_layers=len(layers), form=replace(Form(), layers=layers))


@pytest.fixture(scope="module")
def config(llama: ModelConfig) -> ModelConfig:
    return windowed(llama, WINDOWS)


def make_cache(config: ModelConfig, **options: int) -> KVCache:
    return KVCache(config, torch.float32, 4, **options)


def test_layers_with_one_window_have_one_pool(llama: ModelConfig, config: ModelConfig) -> None:
    cache = make_cache(config)
    assert [(group.window, group.layers) for group in cache.groups] == [
        (None, (0, 4)), (5, (1, 2, 5)), (11, (3,)),
    ]  # fmt: skip
    assert [cache.group_of(layer) for layer in range(6)] == [0, 1, 1, 2, 0, 1]
    assert [pool.kv.shape[0] for pool in cache.pools] == [2, 3, 1]
    for layer in range(6):
        for half in range(2):
            cache.layer(layer)[half].fill_(10 * layer + half)
    assert cache.pools[1].kv[:, :, 0, 0, 0, 0].tolist() == [[10, 11], [20, 21], [50, 51]]
    of_all = KVCache(llama, torch.float32, 4)
    assert cache.page_bytes == of_all.page_bytes == of_all.groups[0].page_bytes
    # A window that hides nothing is none.
    assert make_cache(windowed(llama, [512, None, 600])).groups[0].layers == (0, 1, 2)
    assert [one.window for one in make_cache(windowed(llama, [511] * 6)).groups] == [511]


def seen_positions(window: int | None, first: int, end: int) -> range:
    return range(0 if window is None else max(0, first - window + 1), end)


@pytest.mark.parametrize("window", [1, 2, 5, 8, 64, None])
def test_the_most_pages_at_once_are_the_most(window: int | None) -> None:
    """Over all places where rows may begin: the pages of what they see and of themselves."""
    group = PageGroup((0,), window, (1, 2, 4, 1, 16), torch.float32)
    for num_tokens, num_rows in ((7, 1), (90, 1), (90, 2), (90, 3), (90, 9), (61, 16)):
        held = []
        for first in range(num_tokens - num_rows + 1):
            columns = {at // 4 for at in seen_positions(window, first, first + num_rows)}
            assert group.num_hidden(first) == min(columns)
            held.append(len(columns))
        assert max(held) == group.num_pages_at_once(num_tokens, num_rows)


def test_what_the_window_has_passed_is_had_by_others(config: ModelConfig) -> None:
    cache = make_cache(config)
    one = cache.open(12)
    assert one.tables == [[1, 2, 3]] * 3
    one.length = 10  # a row there sees positions 6 to 10 of layers with a window of 5
    cache.reserve(one, 12)  # has it
    assert one.tables == [[1, 2, 3]] * 3
    cache.reserve(one, 13)
    assert one.tables == [[1, 2, 3, 4], [SCRATCH_PAGE, 2, 3, 1], [1, 2, 3, 4]]
    one.length = 12
    cache.release(one)
    assert one.tables[1:] == [[SCRATCH_PAGE, SCRATCH_PAGE, 3, 1], [1, 2, 3, 4]]
    other = cache.open(5)
    assert other.tables == [[5, 6], [2, 4], [5, 6]]
    assert [pool.num_held_pages for pool in cache.pools] == [6, 4, 6]
    before = [list(pages) for pages in one.tables]
    cache.release(one)
    assert one.tables == before
    cache.close(one)
    cache.close(one)
    assert one.tables == [[], [], []]
    assert [pool.num_held_pages for pool in cache.pools] == [2, 2, 2]


def test_rows_that_are_run_again_see_what_they_saw(config: ModelConfig) -> None:
    cache = make_cache(config, num_again=3)
    one = cache.open(12)
    for length, hidden in ((10, 0), (11, 1), (14, 1), (15, 2)):
        one.length = length
        cache.release(one)
        assert one.tables[1][:2].count(SCRATCH_PAGE) == hidden


def test_without_windows_nothing_is_given_back(llama: ModelConfig) -> None:
    cache = make_cache(llama)
    one = cache.open(100)
    pages = one.pages
    one.length = 100
    cache.reserve(one, 200)
    cache.release(one)
    assert one.pages is pages and one.tables == [list(range(1, 51))] and len(cache.pools) == 1


def test_a_limit_is_of_each_group(config: ModelConfig) -> None:
    cache = make_cache(config, max_pages=6)
    one = cache.open(20)
    tables = [list(pages) for pages in one.tables]
    assert cache.can_hold(4, 1) and not cache.can_hold(5, 1)
    words = "KV cache: no memory for 7 pages of 4 tokens, 0 MiB: max_pages is 6"
    with pytest.raises(MemoryError, match=f"^{words}$"):
        cache.reserve(one, 28)
    assert one.tables == tables
    one.length = 20
    cache.release(one)
    assert [pool.num_held_pages for pool in cache.pools] == [5, 1, 3]
    narrow = make_cache(windowed(config, [5, 5]), max_pages=3)
    assert narrow.can_hold(1000, 4) and not narrow.can_hold(1000, 8)
    with pytest.raises(MemoryError, match="4 pages of 4 tokens of layers with a window of 5, 0 M"):
        narrow.open(16)
    endless, most = narrow.open(), list[int]()
    for length in range(400):
        narrow.reserve(endless, length + 4)
        endless.length = length + 1
        most.append(narrow.num_held_pages)
    assert max(most) == 3 and narrow.num_pages == 3 and len(endless.pages) == 101


def mark(cache: KVCache, one: CachedSequence, positions: range, value: int) -> None:
    """Rows get ``value`` and their places in each group."""
    for pool, pages in zip(cache.pools, one.tables, strict=True):
        at = torch.tensor(positions).long()
        values = (1000.0 * value + at)[:, None, None]
        pool.kv[:, :, torch.tensor(pages)[at // 4], at % 4] = values


def check(cache: KVCache, running: dict[int, CachedSequence]) -> None:
    """Each finds all rows of its own that any later row may see; no page has two owners."""
    for group, pool in enumerate(cache.pools):
        held = [page for one in running.values() for page in one.tables[group] if page]
        assert len(held) == len(set(held)) == pool.num_held_pages
        assert pool.num_held_pages + pool.num_free_pages == pool.num_pages
        for name, one in running.items():
            pages = one.tables[group]
            assert len(pages) == len(one.pages)
            seen = torch.tensor(seen_positions(pool.group.window, one.length, one.length)).long()
            at = torch.tensor(pages)[seen // 4]
            assert (at != SCRATCH_PAGE).all()
            rows = pool.kv[:, :, at, seen % 4]  # [layers, 2, positions, 1, d]
            assert (rows == (1000 * name + seen)[:, None, None]).all(), (group, name)


def test_many_sequences_keep_what_they_see(config: ModelConfig) -> None:
    """Random trees, commits, chunks of prompts, ends, against what was written where."""
    cache, rng, running = make_cache(config), random.Random(0), dict[int, CachedSequence]()
    batch = CacheBatch(cache)
    for turn in range(150):
        if len(running) > 4:
            cache.close(running.pop(rng.choice(list(running))))
        name = rng.choice([*running, turn])
        one = running.setdefault(name, cache.open())
        ahead = rng.choice([1, 2, 7, 30])
        cache.reserve(one, one.length + ahead)
        room = range(one.length, len(one.pages) * 4)
        mark(cache, one, room, 500 + name)  # of which nothing is committed yet
        path = sorted(rng.sample(range(ahead), rng.randint(0, ahead)))
        for place, node in enumerate(path):
            mark(cache, one, range(one.length + node, one.length + node + 1), 0)
            for pool, pages in zip(cache.pools, one.tables, strict=True):
                at = one.length + node
                pool.kv[:, :, pages[at // 4], at % 4] = 1000 * name + one.length + place
        batch.update([one])
        taken = torch.tensor([path or [0]], dtype=torch.int32)
        batch.commit(taken, torch.tensor([len(path)], dtype=torch.int32))
        assert batch.kv_len.tolist() == [one.length]
        if rng.random() < 0.3:
            cache.release(one)
        check(cache, running)
    full, narrow, wide = (pool.num_held_pages for pool in cache.pools)
    assert narrow < wide < full and max(one.length for one in running.values()) == 50


def test_tables_are_written_where_pages_were_given_back(config: ModelConfig) -> None:
    cache = make_cache(config)
    one, other = cache.open(20), cache.open(8)
    batch = CacheBatch(cache, [one, other])
    places = [table.data_ptr() for table in batch.block_tables]
    one.length = 16
    cache.release(one)
    batch.update([one, other])
    for table, *tables in zip(batch.block_tables, one.tables, other.tables, strict=True):
        assert table.tolist() == [pages + [SCRATCH_PAGE] * (8 - len(pages)) for pages in tables]
        assert table.stride(1) == 1
    assert batch.block_table is batch.block_tables[0]
    assert places == [table.data_ptr() for table in batch.block_tables]
    cache.reserve(one, 40)
    batch.update([other, one])
    assert [table.shape for table in batch.block_tables] == [(2, 16)] * 3
    for table, pages in zip(batch.block_tables, one.tables, strict=True):
        assert table[1].tolist() == pages + [SCRATCH_PAGE] * 6


def test_no_page_is_lost_by_an_interrupt(config: ModelConfig) -> None:
    """While a sequence gives back and takes, while it ends: it can go on, or end, at any place."""
    for action in ("reserve", "release", "close"):
        number, was_interrupted = 1, True
        while was_interrupted:
            cache = make_cache(config)
            one, other = cache.open(24), cache.open(9)
            mark(cache, one, range(24), 1)
            mark(cache, other, range(9), 2)
            one.length, other.length = 22, 9
            batch = CacheBatch(cache, [one, other])

            def act() -> None:
                if action == "reserve":  # noqa: B023
                    cache.reserve(one, 90)  # noqa: B023
                elif action == "release":  # noqa: B023
                    cache.release(one)  # noqa: B023
                else:
                    cache.close(one)  # noqa: B023

            was_interrupted = interrupted(act, number)
            for pages in one.tables:  # or a tree's rows would lie where there are none
                assert len(pages) >= len(one.pages)
            if action == "close":
                cache.close(one)
                check(cache, {2: other})
            else:
                cache.reserve(one, 90)
                check(cache, {1: one, 2: other})
                batch.update([one, other])
                for table, pages in zip(batch.block_tables, one.tables, strict=True):
                    assert table[0, : len(pages)].tolist() == pages
            number += 1
        assert number > 4, action


def test_pools_are_fixed_and_retired_one_by_one(config: ModelConfig) -> None:
    cache = make_cache(config)
    cache.fix(9, 3, 4)
    assert [pool.num_pages for pool in cache.pools] == [9, 3, 4] and cache.num_pages == 16
    one = cache.open(12)
    with pytest.raises(MemoryError, match="window of 5"):
        cache.reserve(one, 16)
    cache.retire()
    assert cache.num_held_pages == 9
    cache.close(one)
    cache.retire()
    assert cache.num_pages == 0
