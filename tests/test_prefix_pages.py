"""Pages that sequences which begin alike share: whose they are, what stands there, when they go."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from specrt.cache import SCRATCH_PAGE, CachedSequence, KVCache
from specrt.config import Form, LayerKind, ModelConfig
from specrt.pages import PagePool
from specrt.prefixes import PrefixTree
from tests.interrupts import interrupted

SIZE = 4
Ids = list[int]


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    llama = {
        "model_type": "llama",
        "vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 1, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return ModelConfig.from_dict(llama, source="test")


def windowed(config: ModelConfig, *windows: int | None) -> ModelConfig:
    layers = tuple(LayerKind(window) for window in windows)
    return replace(config, num_layers=len(layers), form=replace(Form(), layers=layers))


def make_cache(config: ModelConfig, kept: int | None = None, **options: int) -> KVCache:
    cache = KVCache(config, torch.float32, SIZE, **options)
    cache.share(kept)
    return cache


def value(ids: Ids, place: int, salt: str) -> float:
    """What a row holds: a function of the tokens up to it, as keys and values are."""
    return float(hash((salt, *ids[: place + 1])) % 2**20)


def write(cache: KVCache, one: CachedSequence, ids: Ids, end: int, salt: str = "") -> None:
    """Run the tokens from its length on."""
    cache.reserve(one, end)
    for pool, pages in zip(cache.pools, one.tables, strict=True):
        for place in range(one.length, end):
            pool.kv[:, :, pages[place // SIZE], place % SIZE] = value(ids, place, salt)
    one.length = end


def check_rows(cache: KVCache, one: CachedSequence, ids: Ids, salt: str = "") -> None:
    """It finds its own rows wherever later ones look."""
    for pool, pages in zip(cache.pools, one.tables, strict=True):
        window = pool.group.window
        first = 0 if window is None else max(0, one.length - cache.num_again - window + 1)
        for place in range(first, one.length):
            page = pages[place // SIZE]
            assert page != SCRATCH_PAGE
            rows = pool.kv[:, :, page, place % SIZE]
            assert (rows == value(ids, place, salt)).all(), (one.tables, place)


def nodes_of(tree: PrefixTree) -> Iterator[list[int]]:
    """The pages of all nodes that are found or wait to go."""
    for node in tree._order:
        yield node.pages


def check_pools(cache: KVCache, running: list[CachedSequence]) -> None:
    """Each page is free, or one sequence's, or shared by as many as are counted."""
    for index, pool in enumerate(cache.pools):
        held = Counter(page for one in running for page in one.tables[index] if page)
        kept = Counter(pages[index] for pages in nodes_of(cache._prefixes) if pages[index])
        assert all(count == 1 for count in kept.values())
        assert pool._users == {page: held[page] for page in kept}
        assert all(count == 1 for page, count in held.items() if page not in kept)
        alone = [page for page in kept if not held[page]]
        assert pool.num_kept_pages == len(alone) and pool.num_shared_pages == len(kept)
        assert pool.num_held_pages == len(held)
        used = {*held, *kept}
        assert sorted([*used, *pool._returned]) == list(range(1, pool._num_touched))
        assert pool.num_held_pages + pool.num_free_pages == pool.num_pages
        if pool.max_pages is not None:
            assert pool.num_pages <= pool.max_pages


def begin(cache: KVCache, ids: Ids, salt: str = "") -> CachedSequence:
    one = cache.open()
    count, _ = cache.find(salt, ids, len(ids) - 1)
    assert cache.take_up(one, salt, ids, len(ids) - 1) == one.length == count
    return one


def run(cache: KVCache, ids: Ids, salt: str = "") -> CachedSequence:
    """A sequence whose prompt is through."""
    one = begin(cache, ids, salt)
    write(cache, one, ids, len(ids) - 1, salt)
    cache.keep(one, salt, ids)
    return one


def end(cache: KVCache, one: CachedSequence, ids: Ids, salt: str = "") -> None:
    cache.keep(one, salt, ids, is_over=True)
    cache.close(one)


PROMPT = [7 * i % 97 for i in range(40)]


@pytest.mark.parametrize("common", [0, 1, 3, 4, 5, 8, 9, 21])
def test_what_two_begin_with(config: ModelConfig, common: int) -> None:
    """While one runs, its whole pages; once it has ended, all of it."""
    cache = make_cache(config)
    mine, other = PROMPT[:22], [*PROMPT[:common], *[90] * 8]
    one = run(cache, mine)
    two = begin(cache, other)
    whole = common // SIZE
    partial = common % SIZE if common < 20 else 0  # the first one's fifth page is not full
    assert two.length == whole * SIZE + partial
    assert two.pages[:whole] == one.pages[:whole]
    assert not {*two.pages[whole:]} & {*one.pages}
    write(cache, two, other, len(other))
    check_rows(cache, one, mine)
    check_rows(cache, two, other)
    check_pools(cache, [one, two])
    end(cache, one, mine)
    three = begin(cache, other[: common + 1])
    assert three.length == common
    check_rows(cache, three, other)
    check_pools(cache, [two, three])


def test_a_turn_begins_with_the_last_ones_answer(config: ModelConfig) -> None:
    cache = make_cache(config)
    for length in (6, 11, 12, 13, 24, 33):
        one = begin(cache, PROMPT[:length])
        write(cache, one, PROMPT, length)
        end(cache, one, PROMPT[:length])
        again = begin(cache, PROMPT)
        assert again.length == length
        cache.close(again)
    check_pools(cache, [])
    # Ends that longer ones hold are not kept besides.
    assert cache.num_shared_pages == 9 and cache.num_held_pages == 0
    end(cache, run(cache, PROMPT[:10]), PROMPT[:10])
    assert cache.num_shared_pages == 9


def test_salts_share_nothing(config: ModelConfig) -> None:
    cache = make_cache(config)
    end(cache, run(cache, PROMPT, "a"), PROMPT, "a")
    assert begin(cache, PROMPT, "b").length == begin(cache, PROMPT).length == 0
    assert begin(cache, PROMPT, "a").length == 39


def test_nothing_is_shared_before_it_is_let(config: ModelConfig) -> None:
    for cache in (KVCache(config, torch.float32, SIZE), make_cache(config, 0)):
        end(cache, run(cache, PROMPT), PROMPT)
        assert begin(cache, PROMPT).length == cache.num_shared_pages == 0
    assert cache._prefixes._tops == {}


def test_the_bound(config: ModelConfig) -> None:
    """What was used longest ago goes first, its end before its beginning."""
    cache = make_cache(config, 6 * SIZE)
    texts = [[salt, *PROMPT[:11]] for salt in range(3)]  # three pages each
    for ids in texts[:2]:
        end(cache, run(cache, ids), ids)
    assert [begin(cache, ids).length for ids in texts] == [11, 11, 0]
    for one in (begin(cache, texts[1]), begin(cache, texts[0])):  # the second is the older now
        cache.close(one)
    assert cache.num_held_pages == 6
    cache = make_cache(config, 6 * SIZE)
    for ids in (*texts[:2], texts[0], texts[2][:8]):
        end(cache, run(cache, ids), ids)
        assert cache.num_held_pages == 0 and cache.num_shared_pages <= 6
        check_pools(cache, [])
    found = [cache.find("", ids, 11) for ids in texts]
    assert [count for count, _ in found] == [11, 4, 7]
    cache.share(4)
    assert cache.num_shared_pages == 1
    cache.share(0)
    assert cache.num_shared_pages == 0 and cache._prefixes._tops == {}
    assert not cache._prefixes._order


def test_what_is_in_use_is_not_bounded(config: ModelConfig) -> None:
    cache = make_cache(config, SIZE)
    one = run(cache, PROMPT)
    assert cache.num_shared_pages == 9
    two = run(cache, PROMPT[:30])
    assert two.pages[:7] == one.pages[:7]
    end(cache, one, PROMPT)
    assert cache.num_shared_pages == 8  # the other's, and one
    end(cache, two, PROMPT[:30])
    assert cache.num_shared_pages == 1
    check_pools(cache, [])


def test_kept_pages_are_free_ones(config: ModelConfig) -> None:
    """Those that ask get them; nobody is told that there is no room."""
    cache = make_cache(config, max_pages=10)
    end(cache, run(cache, PROMPT[:33]), PROMPT[:33])
    assert cache.num_free_pages == cache.num_pages and cache.num_shared_pages == 8
    assert cache.can_hold(40, 1) and not cache.can_hold(41, 1)
    other = cache.open(24)
    assert cache.num_shared_pages == 4 and cache.num_held_pages == 6
    check_pools(cache, [other])
    one = begin(cache, PROMPT)
    assert one.length == 16 and cache.num_held_pages == 10
    assert cache.find("", PROMPT, 39) == (16, 4)
    assert cache.can_hold(16, 1, 4) and not cache.can_hold(17, 1, 4)
    with pytest.raises(MemoryError, match="no memory for 11 pages of 4 tokens, 0 MiB: max_pages"):
        cache.reserve(one, 17)
    check_pools(cache, [one, other])


def test_no_page_for_the_end_of_it(config: ModelConfig) -> None:
    cache = make_cache(config, max_pages=5)
    one = run(cache, PROMPT[:18])
    held = [list(pages) for pages in one.tables]
    with pytest.raises(MemoryError, match="no memory for 6 pages"):
        cache.take_up(two := cache.open(), "", [*PROMPT[:14], 96], 14)
    assert two.pages == [] and two.length == 0 and one.tables == held
    check_pools(cache, [one])


def test_who_has_computed_it_again_holds_the_first_ones(config: ModelConfig) -> None:
    cache = make_cache(config)
    one, two = cache.open(), cache.open()
    for each in (one, two):
        write(cache, each, PROMPT, 39)
    cache.keep(one, "", PROMPT)
    mine = list(two.pages)
    cache.keep(two, "", PROMPT)
    assert two.pages == [*one.pages[:9], mine[9]] and cache.num_held_pages == 11
    check_pools(cache, [one, two])
    check_rows(cache, two, PROMPT)


def test_windows_share_what_they_see(config: ModelConfig) -> None:
    """Layers that see all have every page; of the others only those that are seen are needed."""
    cache = make_cache(windowed(config, None, 5, None, 9))
    one = run(cache, PROMPT)
    assert [len(pool.kv) for pool in cache.pools] == [2, 1, 1]
    two = begin(cache, PROMPT)
    assert two.length == 36 and two.tables[0] == one.tables[0][:9]
    assert two.tables[1][:8] == [*two.tables[2][:7], SCRATCH_PAGE] == [SCRATCH_PAGE] * 8
    write(cache, two, PROMPT, 40)
    check_rows(cache, two, PROMPT)
    check_pools(cache, [one, two])
    cache.release(one)
    cache._prefixes.give_back(1, 4)  # the first four pages
    assert cache.pools[1].num_kept_pages == 4
    assert cache.find("", [*PROMPT[:10], 96], 10)[0] == 0
    assert cache.find("", [*PROMPT[:21], 96], 21)[0] == 21
    check_pools(cache, [one, two])
    end(cache, one, PROMPT)
    end(cache, two, PROMPT)
    assert cache.find("", [*PROMPT, 96], 40)[0] == 40


def test_all_layers_see_a_window(config: ModelConfig) -> None:
    cache = make_cache(windowed(config, 5, 5), max_pages=6)
    one = cache.open()
    for place in range(39):  # there are never more than so many pages, and all of the text is kept
        write(cache, one, PROMPT, place + 1)
        cache.keep(one, "", PROMPT)
        check_pools(cache, [one])
    end(cache, one, PROMPT)
    assert cache.num_shared_pages <= 6
    two = begin(cache, PROMPT)
    assert two.length == 39
    check_rows(cache, two, PROMPT)
    check_pools(cache, [two])
    cache.close(two)
    cache.share(0)
    assert not cache._prefixes._tops and not cache._prefixes._order


def test_rows_that_are_run_again_are_nobody_elses(config: ModelConfig) -> None:
    cache = make_cache(config, num_again=6)
    one = run(cache, PROMPT)  # 33 rows are for good
    assert cache.num_shared_pages == 8
    two = begin(cache, [*PROMPT[:20], 96])
    assert two.length == 14
    end(cache, one, PROMPT)
    assert begin(cache, PROMPT).length == 33


def test_what_is_forgotten_is_not_found(config: ModelConfig) -> None:
    cache = make_cache(config)
    end(cache, run(cache, [96, *PROMPT]), [96, *PROMPT])
    one = run(cache, PROMPT)
    cache.forget()
    assert cache.num_shared_pages == 9 and begin(cache, PROMPT).length == 0
    two = run(cache, PROMPT)
    assert not {*two.pages} & {*one.pages}
    check_pools(cache, [one, two])
    end(cache, one, PROMPT)
    end(cache, two, PROMPT)
    assert begin(cache, PROMPT).length == 39
    cache.share(0)
    cache.retire()


def walk(cache: KVCache, seed: int, num_turns: int) -> None:
    """Sequences of a few tokens, so that many begin alike: come, grow, are dropped, end."""
    rng, running = random.Random(seed), list[tuple[CachedSequence, Ids, str]]()
    known = [[]]
    hits = 0
    for _ in range(num_turns):
        if running and rng.random() < 0.45:
            one, ids, salt = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.8:
                cache.keep(one, salt, ids, is_over=True)
                known = [*known[-20:], ids]
            cache.close(one)
        elif running and rng.random() < 0.6:
            one, ids, salt = rng.choice(running)
            ids.extend(rng.randrange(3) for _ in range(rng.randrange(1, 9)))
            try:
                write(cache, one, ids, len(ids) - 1, salt)
            except MemoryError:
                del ids[one.length + 1 :]
            if rng.random() < 0.3:
                cache.release(one)
        else:
            old, salt = rng.choice(known), rng.choice(["", "", "s"])
            ids = old[: rng.randint(0, len(old))] + [rng.randrange(3) for _ in range(5)]
            try:
                one = begin(cache, ids, salt)
            except MemoryError:
                continue
            hits += one.length
            running.append((one, ids, salt))
            try:
                write(cache, one, ids, len(ids) - 1, salt)
            except MemoryError:
                cache.close(one)
                running.pop()
                continue
            cache.keep(one, salt, ids)
        if rng.random() < 0.02:
            cache.forget()
        check_pools(cache, [one for one, _, _ in running])
        for one, ids, salt in running:
            check_rows(cache, one, ids, salt)
    assert hits > num_turns / 2


OPTIONS = {"free": {}, "bound": {"kept": 40}, "few": {"max_pages": 24}, "again": {"num_again": 3}}
WINDOWS = {"none": (None, None), "mixed": (None, 5, 9), "all": (5, 9)}


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_many_sequences_share_and_none_sees_anothers_rows(
    config: ModelConfig, options: dict[str, int], windows: tuple[int | None, ...]
) -> None:
    walk(make_cache(windowed(config, *windows), **options), seed=1, num_turns=300)


def no_copy(pool: PagePool, tables: list[list[int]]) -> None:
    """As if whoever shares a page in part went on writing in it."""


@pytest.mark.parametrize(
    ("place", "name", "mutant"),
    [
        (PagePool, "copy_last", no_copy),
        (PagePool, "is_held", lambda pool, page: False),
        (PrefixTree, "_has_seen", lambda tree, nodes, num_tokens: True),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_page_that_another_writes_is_found_out(
    config: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    place: type,
    name: str,
    mutant: Callable[..., object],
) -> None:
    monkeypatch.setattr(place, name, mutant)
    with pytest.raises((AssertionError, KeyError)):
        walk(make_cache(windowed(config, None, 5, 9), max_pages=24), seed=1, num_turns=300)


@pytest.mark.parametrize("action", ["take up", "keep", "end", "make room", "forget"])
def test_no_page_is_lost_by_an_interrupt(config: ModelConfig, action: str) -> None:
    """Wherever it comes: once all have ended, every page is free or found again."""
    number, was_interrupted = 1, True
    while was_interrupted:
        cache = make_cache(windowed(config, None, 5, 9), max_pages=40)
        one, two = run(cache, PROMPT), cache.open()
        end(cache, run(cache, [*PROMPT[:13], 96]), [*PROMPT[:13], 96])
        end(cache, run(cache, [95, *PROMPT]), [95, *PROMPT])
        ids = [*PROMPT[:14], 94, 93, 92, 91]
        actions = {
            "take up": lambda: cache.take_up(two, "", ids, 14),  # noqa: B023
            "keep": lambda: cache.keep(two, "", ids),  # noqa: B023
            "end": lambda: end(cache, one, PROMPT),  # noqa: B023
            "make room": lambda: cache.reserve(two, 110),  # noqa: B023
            "forget": cache.forget,
        }
        if action == "keep":
            write(cache, two, ids, 17)
        was_interrupted = interrupted(actions[action], number)
        for each in (one, two):
            cache.close(each)
        check_pools(cache, [])
        three = begin(cache, PROMPT)
        write(cache, three, PROMPT, 39)
        check_rows(cache, three, PROMPT)
        end(cache, three, PROMPT)
        check_pools(cache, [])
        four = begin(cache, ids)
        check_rows(cache, four, ids)
        cache.close(four)
        cache.share(0)
        assert cache.num_shared_pages == 0 and cache.num_free_pages == cache.num_pages
        assert not cache._prefixes._order and not cache._prefixes._tops
        number += 1
    assert number > 4, action
