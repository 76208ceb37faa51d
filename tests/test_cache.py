"""Pages, whose they are, and the tables of those that run together."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from specrt import pages as pages_module
from specrt.cache import SCRATCH_PAGE, CacheBatch, CachedSequence, KVCache
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.tree import chain_tree
from tests.checkpoints import make_checkpoint
from tests.engine.support import make_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path)
    return ModelConfig.from_directory(path)


def test_pages_are_taken_as_they_are_needed(config: ModelConfig) -> None:
    cache = KVCache(config, torch.float32, page_size=4)
    one, two = cache.open(), cache.open()
    assert one.pages == two.pages == [] and cache.num_pages == 0
    cache.reserve(one, 4)
    cache.reserve(two, 5)
    cache.reserve(one, 9)
    assert (one.pages, two.pages) == ([1, 4, 5], [2, 3])
    for num_tokens in (0, 1, 9, 12):  # had already
        cache.reserve(one, num_tokens)
    assert one.pages == [1, 4, 5] and cache.num_held_pages == 5
    cache.close(two)
    cache.close(cache.open(20))  # the lowest free ones first: touched memory is used again
    assert cache.open(12).pages == [2, 3, 6]
    assert [cache.num_pages_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_a_limit_of_pages(config: ModelConfig) -> None:
    cache = KVCache(config, torch.float32, page_size=4, max_pages=5)
    one, two = cache.open(9), cache.open(4)
    assert cache.can_hold(4, 1) and not cache.can_hold(5, 1)
    pages, kv = list(one.pages), cache.kv
    size = 6 * cache.page_bytes / 2**20
    words = f"KV cache: no memory for 6 pages of 4 tokens, {size:.0f} MiB: max_pages is 5"
    for ask in (lambda: cache.reserve(one, 17), lambda: cache.open(8)):
        with pytest.raises(MemoryError, match=f"^{words}$"):
            ask()
        assert one.pages == pages and cache.kv is kv and cache.num_held_pages == 4
    cache.reserve(one, 16)
    assert cache.num_pages == cache.num_held_pages == 5 and cache.can_hold(0, 1)
    cache.close(two)
    cache.reserve(one, 20)
    with pytest.raises(ValueError, match="max_pages: expected at least 1, got 0"):
        KVCache(config, torch.float32, max_pages=0)


def test_no_memory_for_twice_as_many_pages(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is needed is tried before it is given up, which leaves everything as it was."""
    cache = KVCache(config, torch.float32, page_size=4)
    one = cache.open(4)
    held, asked, make = list(one.pages), list[int](), pages_module._untouched_zeros

    def room_for_41_pages(shape: tuple[int, ...], *place: object) -> torch.Tensor:
        asked.append(shape[2])
        if shape[2] > 41:
            raise OSError(12, "Cannot allocate memory")
        return make(shape, *place)  # type: ignore[arg-type]

    monkeypatch.setattr(pages_module, "_untouched_zeros", room_for_41_pages)
    cache.reserve(one, 4 * 17)
    assert asked == [33] and cache.num_pages == 32
    kv, taken = cache.kv, list(one.pages)
    with pytest.raises(MemoryError, match=r"KV cache: no memory for 41 pages of 4 tokens, \d+ MiB"):
        cache.reserve(one, 4 * 41)
    assert cache.kv is kv and one.pages == taken and taken[:1] == held
    cache.reserve(one, 4 * 40)
    assert asked == [33, 65, 42, 65, 41] and cache.num_pages == len(one.pages) == 40


def fill(cache: KVCache, sequence: CachedSequence, first: int, value: int) -> None:
    """Rows from ``first`` to the last reserved one get ``value`` and their places."""
    for place in range(first, len(sequence.pages) * cache.page_size):
        page, row = sequence.pages[place // cache.page_size], place % cache.page_size
        cache.kv[:, :, page, row] = 1000 * value + place


def test_many_sequences_grow_among_each_other(config: ModelConfig) -> None:
    """Each has its own rows, whoever comes, grows and goes; pages move a logarithm of times."""
    moves = list[int]()

    class Moving(Device):
        def forget(self) -> None:
            moves.append(cache.num_pages)

    cache = KVCache(config, torch.float32, 2, device=Moving())
    rng, running = random.Random(0), dict[int, CachedSequence]()
    for turn in range(400):
        if len(running) > 12:
            cache.close(running.pop(rng.choice(list(running))))
        name = rng.choice([*running, turn])
        sequence = running.setdefault(name, cache.open())
        had = len(sequence.pages) * cache.page_size
        cache.reserve(sequence, had + rng.randrange(8))
        fill(cache, sequence, had, name)
        held = [page for one in running.values() for page in one.pages]
        assert len(held) == len(set(held)) == cache.num_held_pages and SCRATCH_PAGE not in held
    for name, sequence in running.items():
        expected = cache.kv.clone()
        fill(cache, sequence, 0, name)
        assert torch.equal(cache.kv, expected)
    assert moves == [0, *(16 << i for i in range(len(moves) - 1))] and cache.num_held_pages > 64


def test_fresh_pages_cost_no_memory(config: ModelConfig) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    cache = KVCache(config, torch.float32)
    cache.open(1)
    before = resident()
    sequence = cache.open(2**30 // cache.page_bytes * cache.page_size)
    assert cache.kv.nbytes >= 2**30
    assert not cache.kv[:, :, sequence.pages[-1]].any()
    assert resident() - before < 2**28


def assert_is_table_of(batch: CacheBatch, sequences: list[CachedSequence], width: int) -> None:
    assert batch.sequences == sequences
    assert batch.block_table.shape == (len(sequences), width)
    assert batch.block_table.stride(1) == 1 and batch.kv_len.is_contiguous()
    rows = [one.pages + [SCRATCH_PAGE] * (width - len(one.pages)) for one in sequences]
    assert batch.block_table.tolist() == rows
    assert batch.kv_len.tolist() == [one.length for one in sequences]


def test_only_the_rows_that_changed_are_written(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = list[tuple[str, int]]()

    def counting(name: str) -> Callable[[CacheBatch, int, object], None]:
        write = getattr(CacheBatch, f"_write_{name}")

        def counted(batch: CacheBatch, row: int, value: object) -> None:
            written.append((name, row))
            write(batch, row, value)

        return counted

    for name in ("pages", "length"):
        monkeypatch.setattr(CacheBatch, f"_write_{name}", counting(name))
    cache = KVCache(config, torch.float32, page_size=4)
    one, two, three, four = (cache.open(4) for _ in range(4))

    def writes_for(*sequences: CachedSequence) -> list[tuple[str, int]]:
        written.clear()
        assert batch.update(sequences) is batch
        assert_is_table_of(batch, list(sequences), 8)
        return list(written)

    batch = CacheBatch(cache, [one, two, three, four])
    place = batch.block_table.data_ptr(), batch.kv_len.data_ptr()
    assert writes_for(one, two, three, four) == []
    path = torch.zeros(4, 1, dtype=torch.int32)
    batch.commit(path, torch.tensor([1, 0, 1, -1], dtype=torch.int32))
    assert writes_for(one, two, three, four) == []
    assert writes_for(one, two) == writes_for(one) == []
    assert writes_for(one, two, three) == []
    assert writes_for(three, two) == [("pages", 0)]  # as long as the first
    three.length = 3  # through another batch
    cache.reserve(two, 8)
    assert writes_for(three, two) == [("length", 0), ("pages", 1)]
    cache.close(two)
    cache.open(4)
    cache.reserve(two, 8)  # as many pages, but others
    assert writes_for(three, two, three) == [("pages", 1), ("length", 2)]
    assert place == (batch.block_table.data_ptr(), batch.kv_len.data_ptr())


def test_a_batch_is_always_that_of_its_sequences(config: ModelConfig) -> None:
    cache = KVCache(config, torch.float32, page_size=2)
    batch, rng, running = CacheBatch(cache), random.Random(1), list[CachedSequence]()
    assert_is_table_of(batch, [], 8)
    widths = set()
    for _ in range(300):
        rng.shuffle(running)
        while len(running) > 6 or (running and rng.random() < 0.1):
            cache.close(running.pop())
        running.append(cache.open(rng.choice([0, 1, 30, 70])))
        one = rng.choice(running)
        cache.reserve(one, rng.choice([1, 2, 3]) + len(one.pages) * cache.page_size)
        longest = max(len(one.pages) for one in running)
        widths.add(width := next(w for w in (8, 16, 32, 64, 128) if w >= longest))
        batch.update(running)
        assert_is_table_of(batch, running, width)
        counts = [rng.randrange(-1, 3) * (2 + x.length <= 2 * len(x.pages)) for x in running]
        path = torch.arange(2, dtype=torch.int32).expand(len(running), -1).contiguous()
        before = [x.length for x in running]
        batch.commit(path, torch.tensor(counts, dtype=torch.int32))
        pairs = zip(before, counts, strict=True)
        assert [x.length for x in running] == [length + max(0, n) for length, n in pairs]
        assert_is_table_of(batch, running, width)
        assert CacheBatch(cache, running).block_table.tolist() == batch.block_table.tolist()
    assert widths >= {8, 16, 32}


def test_what_was_never_reserved_is_not_committed(config: ModelConfig) -> None:
    cache = KVCache(config, torch.float32, page_size=4)
    batch = CacheBatch(cache, [cache.open(3)])
    path = torch.arange(5, dtype=torch.int32)[None]
    batch.commit(path, torch.tensor([4], dtype=torch.int32))
    with pytest.raises(AssertionError, match="scratch page"):
        batch.commit(path, torch.tensor([1], dtype=torch.int32))


def test_pages_that_are_given_back_twice_are_had_once(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    cache = make_model(tmp_path).new_cache()
    first, second = cache.open(100), cache.open(100)
    cache.close(first)
    cache.close(first)
    assert cache.num_held_pages == 2
    others = [cache.open(100), cache.open(100)]
    held = [page for one in (second, *others) for page in one.pages]
    assert len(held) == len(set(held)) == 6
    cache.close(first)  # whose pages are somebody else's by now
    assert cache.num_held_pages == 6


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
    assert cache.num_held_pages == 2
    cache.close(one)
    cache.retire()
    assert cache.num_pages == cache.num_free_pages == 0
    with pytest.raises(RuntimeError, match="KV cache: expected one in use"):
        cache.open(1)
    assert cache.num_pages == 0
