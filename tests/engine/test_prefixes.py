"""Prompts that begin alike: computed once, and said as without."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Drafter, EmptyDrafter, PrefixDrafter
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.recycle.drafter import RecycleDrafter
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.draft.small_model.on_device import DeviceSmallModelDrafter
from specrt.draft.with_lookup import WithLookup
from specrt.engine import memory
from specrt.engine.engine import Engine
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from specrt.types import SequenceState
from tests import watched_windows
from tests.checkpoints import make_draft_checkpoint
from tests.drafters.fspad_rig import make_drafter as make_fspad
from tests.engine.exits import make_drafter as make_eesd
from tests.engine.exits import make_exit_pair, make_launched_drafter
from tests.engine.support import make_engine, texts
from tests.engine.test_arrivals import Case, Rig, run_all
from tests.engine.test_windows import windowed
from tests.simulated_gpu import only_simulated
from tests.test_prefix_pages import check_pools

VOCAB = 97
SYSTEM = [(11 * i * i + 3 * i) % VOCAB for i in range(140)]
GREEDY = SamplingParams(max_new_tokens=30, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.8, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prefixes")
    target, _ = make_exit_pair(path)
    make_draft_checkpoint(target, path / "fspad")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaModel:
    config = ModelConfig.from_directory(folder / "target")
    return LlamaModel(config, load_weights(folder / "target", config, torch.float32))


def drafters(model: LlamaModel, folder: Path) -> dict[str, Callable[[], Drafter]]:
    fspad = partial(make_fspad, model, folder / "fspad")
    return {
        "plain": EmptyDrafter,
        "lookup": PromptLookupDrafter,
        "recycle": lambda: RecycleDrafter(VOCAB),
        "small": lambda: SmallModelDrafter(model, depth=3, width=2),
        "fspad": fspad,
        "fspad+lookup": lambda: WithLookup(fspad(), PromptLookupDrafter()),
        "eesd": lambda: make_eesd(model, folder / "exit"),
    }


DRAFTERS = ["plain", "lookup", "recycle", "small", "fspad", "fspad+lookup", "eesd"]


def caches(engine: Engine) -> list:
    own = getattr(engine.drafter, "cache", None)
    return [engine.cache] if own is None else [engine.cache, own]


def talk(engine: Engine, params: SamplingParams) -> list[list[int]]:
    """One after another and together: prompts that share so many tokens, chats, the same ones."""
    said = []
    for number in (0, 1, 63, 64, 65, 128, 129, 140):
        said.append(engine.generate([*SYSTEM[:number], 90, *SYSTEM[:3]], params).token_ids)
    turn = [*SYSTEM[:100]]
    for number in range(3):
        said.append(engine.generate(turn, params).token_ids)
        turn += [*said[-1], number, 50]
    together = [[*SYSTEM[:130], number] for number in range(3)] + [SYSTEM] * 2
    said += texts(engine.generate(together, [replace(params, seed=i) for i in range(5)]))
    assert all(cache.num_held_pages == 0 for cache in caches(engine))
    for cache in caches(engine):
        check_pools(cache, [])
    return said


@pytest.fixture(scope="module")
def expected(model: LlamaModel) -> Mapping[SamplingParams, list[list[int]]]:
    found = {}
    for params in (GREEDY, DRAWN):
        engine = make_engine(model, max_shared_tokens=0, max_batch=1)
        found[params] = talk(engine, params)
        assert engine.stats.prefix_hits == engine.stats.num_shared_pages == 0
    return found


@pytest.mark.parametrize(
    "params", [pytest.param(GREEDY, marks=pytest.mark.slow), DRAWN], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("name", DRAFTERS)
def test_all_say_what_they_say_without(
    model: LlamaModel,
    folder: Path,
    expected: Mapping[SamplingParams, list[list[int]]],
    name: str,
    params: SamplingParams,
) -> None:
    drafter = drafters(model, folder)[name]()
    engine = make_engine(model, drafter, max_batch=4)
    assert talk(engine, params) == expected[params]
    stats = engine.stats
    assert stats.prefix_hits > 0.7 * stats.prefix_queries
    again = engine.generate([*SYSTEM, 1, 2], params)
    assert again.stats.num_cached_tokens >= 139
    engine.close()
    assert all(cache.num_shared_pages == 0 for cache in caches_of(drafter))


def caches_of(drafter: Drafter) -> list:
    return [drafter.cache] if isinstance(drafter, PrefixDrafter) else []


@pytest.mark.parametrize("name", ["plain", "small", "fspad", "eesd"])
def test_few_pages(
    model: LlamaModel,
    folder: Path,
    expected: Mapping[SamplingParams, list[list[int]]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who gives way finds its own pages again, if nobody needed them."""
    monkeypatch.setattr(memory, "PAGE_SIZE", 8)
    drafter = drafters(model, folder)[name]()
    engine = make_engine(
        model, drafter, max_batch=4, max_cached_tokens=300, max_nodes=8, prefill_chunk=50
    )
    preempted = list[object]()
    preempt = engine._core.scheduler.preempt
    monkeypatch.setattr(
        engine._core.scheduler, "preempt", lambda one: (preempted.append(one), preempt(one))
    )
    assert talk(engine, DRAWN) == expected[DRAWN]
    prompts = [[number, *SYSTEM[:90]] for number in range(4)]
    alone = make_engine(model, max_shared_tokens=0).generate(prompts, GREEDY)
    assert texts(engine.generate(prompts, GREEDY)) == texts(alone)
    assert preempted and engine.stats.num_pages <= 38 and engine.stats.num_held_pages == 0


@pytest.mark.parametrize("common", [0, 1, 63, 64, 65, 127, 128, 129])
def test_what_is_found(model: LlamaModel, common: int) -> None:
    """Of one that has ended all that is common, of one that runs its whole pages."""
    engine = make_engine(model)
    first, second = SYSTEM, [*SYSTEM[:common], (SYSTEM[common] + 1) % VOCAB, 95]
    engine.generate(first, GREEDY)
    assert engine.generate(second, GREEDY).stats.num_cached_tokens == common
    assert engine.generate(first, GREEDY).stats.num_cached_tokens == len(first) - 1
    engine = make_engine(model)
    one, two = engine.generate([first, second], GREEDY)
    assert one.stats.num_cached_tokens == 0
    assert two.stats.num_cached_tokens == common // 64 * 64 + (common % 64 if common < 128 else 0)


def test_pages_are_held_together(model: LlamaModel) -> None:
    engine = make_engine(model, max_batch=8)
    for _ in range(8):
        engine.add(SYSTEM, GREEDY)
    engine.step()
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting) == (8, 0)
    # Two whole pages, and one each for the rest of the prompt.
    assert (stats.num_held_pages, stats.num_shared_pages) == (2 + 8, 2)
    assert (stats.prefix_queries, stats.prefix_hits) == (8 * 139, 7 * 128)
    while not engine.is_idle:
        engine.step()
    stats = engine.stats
    assert stats.num_held_pages == 0 and stats.num_shared_pages == 3


def test_who_shares_what_others_hold_needs_less_room(model: LlamaModel) -> None:
    engine = make_engine(model, max_batch=8, max_nodes=8, max_cached_tokens=6 * 64)
    for _ in range(3):
        engine.add(SYSTEM, GREEDY)
    engine.step()
    assert engine.stats.num_running == 3 and engine.stats.num_held_pages == 5


def test_salts_share_nothing(model: LlamaModel) -> None:
    engine = make_engine(model)
    for salt, number in (("a", 0), ("b", 0), ("", 0), ("a", 139)):
        result = engine.generate(SYSTEM, GREEDY, cache_salt=salt)
        assert result.stats.num_cached_tokens == number
    with pytest.raises(ValueError, match="cache_salt: expected a str, got 3"):
        engine.generate(SYSTEM, cache_salt=3)


def test_the_bound(model: LlamaModel, folder: Path) -> None:
    drafter = drafters(model, folder)["fspad"]()
    engine = make_engine(model, drafter, max_shared_tokens=200)
    for number in range(5):
        engine.generate([number, *SYSTEM], GREEDY)
        assert all(cache.num_shared_pages <= 4 for cache in caches(engine))
    assert engine.stats.num_shared_pages == 4
    with pytest.raises(ValueError, match="max_shared_tokens: expected at least 0, got -1"):
        make_engine(model, max_shared_tokens=-1)


def test_a_page_that_somebody_has_written_is_seen(model: LlamaModel) -> None:
    """These tests would fail if it were: what is shared is read."""
    engine = make_engine(model)
    said = engine.generate(SYSTEM, GREEDY).token_ids
    engine.cache.kv[:, :, 1, 3].add_(1.0)
    assert engine.generate(SYSTEM, GREEDY).token_ids != said


def test_what_gave_nan_is_not_found_again(model: LlamaModel) -> None:
    engine = make_engine(model)
    said = engine.generate(SYSTEM, GREEDY).token_ids
    engine.cache.kv[:, :, 1, 3] = float("nan")
    assert "NaN" in (engine.generate(SYSTEM, GREEDY).error or "")
    again = engine.generate(SYSTEM, GREEDY)
    assert again.stats.num_cached_tokens == 0 and again.token_ids == said


@pytest.mark.parametrize("windows", [(24, None, 40, 24), (24, 24, 24, 24)], ids=["mixed", "all"])
def test_windows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, windows: tuple[int | None, ...]
) -> None:
    """A beginning is of use where all that is seen from its end is there."""
    monkeypatch.setattr(memory, "PAGE_SIZE", 8)
    config = ModelConfig.from_directory(folder / "target")
    weights = load_weights(folder / "target", config, torch.float32)
    model = LlamaModel(windowed(config, windows), weights, Device(is_eager=True))
    watched_windows.watch(monkeypatch)
    params, asked = replace(DRAWN, max_new_tokens=6), [SYSTEM[:58], [*SYSTEM[:41], 2, 3]]

    def said(engine: Engine) -> list[list[int]]:
        answers = texts(engine.generate(asked, params))
        answers += texts(engine.generate([[*one, *answers[0], 5] for one in asked], params))
        for cache in caches(engine):
            check_pools(cache, [])
        return answers

    expected = said(make_engine(model, max_shared_tokens=0, max_batch=1))
    for options in ({}, {"max_cached_tokens": 120, "max_nodes": 8}, {"max_shared_tokens": 60}):
        drafter = SmallModelDrafter(model, depth=3) if options else EmptyDrafter()
        engine = make_engine(model, drafter, max_batch=3, prefill_chunk=40, **options)
        assert said(engine) == expected
        assert engine.stats.prefix_hits > 0.2 * engine.stats.prefix_queries


# --- drafters of others ---------------------------------------------------------------------------


class Listening(EmptyDrafter):
    """Says where prompts were run."""

    def __init__(self, *taps: str) -> None:
        self.taps = taps
        self.heard = list[tuple[int, int]]()

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        self.heard.append((start, sum(tap.shape[1] for tap in taps.values())))


class Knowing(Listening):
    """As if it kept something."""

    def __init__(self, known: object) -> None:
        super().__init__("final")
        self._known = known
        self.begun = list[int]()

    def num_known(self, state: SequenceState, most: int) -> int:
        if isinstance(self._known, Exception):
            raise self._known
        return min(self._known, most)  # type: ignore[call-overload, no-any-return]

    def begin_at(self, state: SequenceState, count: int) -> None:
        self.begun.append(count)


def test_who_reads_states_is_shown_all_of_them(model: LlamaModel) -> None:
    drafter = Listening("final")
    engine = make_engine(model, drafter)
    for _ in range(2):
        engine.generate(SYSTEM, GREEDY)
    assert drafter.heard == [(0, 128), (128, 11)] * 2 and engine.stats.prefix_hits == 0


@pytest.mark.parametrize("taps", [(), ("logits",)])
def test_who_reads_none_is_not_asked(model: LlamaModel, taps: Sequence[str]) -> None:
    drafter = Listening(*taps)
    engine = make_engine(model, drafter)
    engine.generate(SYSTEM, GREEDY)
    engine.generate([*SYSTEM, 1, 2], GREEDY)
    assert [start for start, _ in drafter.heard] == [0, 128, 140]


def test_the_target_begins_where_its_drafter_does(model: LlamaModel) -> None:
    drafter = Knowing(70)
    engine = make_engine(model, drafter)
    said = texts([engine.generate(SYSTEM, GREEDY) for _ in range(2)])
    assert said[0] == said[1]
    assert drafter.heard[2:] == [(70, 69)] and drafter.begun == [70]
    assert engine.stats.prefix_hits == 70


@pytest.mark.parametrize("known", [-1, "all", None, RuntimeError("broken (planted)")], ids=repr)
def test_who_answers_nonsense_is_not_asked_again(model: LlamaModel, known: object) -> None:
    drafter = Knowing(known)
    engine = make_engine(model, drafter)
    said = [engine.generate(SYSTEM, GREEDY) for _ in range(2)]
    assert said[0].token_ids == said[1].token_ids and drafter.begun == []
    assert said[1].stats.num_cached_tokens == 139


# --- what goes wrong, at random -------------------------------------------------------------------


def chats(model: LlamaModel) -> tuple[Case, ...]:
    rng, cases = random.Random(3), dict[tuple[int, ...], Case]()
    alone = make_engine(model, max_shared_tokens=0, max_batch=1)
    prompts = [[*SYSTEM[: rng.choice([20, 64, 100])], rng.randrange(VOCAB)] for _ in range(4)]
    while len(cases) < 14:
        prompt = rng.choice(prompts)
        params = replace(rng.choice([GREEDY, DRAWN]), max_new_tokens=rng.choice([2, 20, 50]))
        said = alone.generate(prompt, params)
        cases[tuple(prompt)] = Case(tuple(prompt), params, said)
        prompts.append([*prompt, *said.token_ids[:40], rng.randrange(VOCAB)])
    return tuple(cases.values())


def run_chats(
    folder: Path, model: LlamaModel, seeds: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PAGE_SIZE", 8)
    made = {name: make() for name, make in drafters(model, folder).items()}
    happened = run_all(Rig(model, made, chats(model)), seeds, 12, monkeypatch)
    assert happened["found"] and happened["preempted"] and happened["interrupted"]


def test_chats_at_random(folder: Path, model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run_chats(folder, model, range(4, 9), monkeypatch)


@pytest.mark.slow
def test_chats_at_random_many_times(
    folder: Path, model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_chats(folder, model, range(100, 300), monkeypatch)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide")
    sizes = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    target, _ = make_exit_pair(path, **sizes, dtype=torch.bfloat16)
    make_draft_checkpoint(target, path / "fspad")
    return path


@only_simulated
@pytest.mark.parametrize(
    "name",
    ["fspad", "small", *(pytest.param(one, marks=pytest.mark.slow) for one in ("plain", "eesd"))],
)
def test_on_a_gpu(wide: Path, gpu: Device, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fixed number of pages, in rounds that are launched ahead."""
    monkeypatch.setattr(memory, "PAGE_SIZE", 8)
    config = ModelConfig.from_directory(wide / "target")
    weights = place_weights(load_weights(wide / "target", config, torch.bfloat16), gpu)
    model = LlamaModel(config, weights, gpu)
    make: dict[str, Callable[[], Drafter]] = {
        "plain": EmptyDrafter,
        "fspad": lambda: make_fspad(model, wide / "fspad"),
        "eesd": lambda: make_launched_drafter(model, wide / "exit"),
        "small": lambda: DeviceSmallModelDrafter(model, depth=2),
    }
    params = replace(DRAWN, max_new_tokens=8)
    asked = [SYSTEM[:40], [*SYSTEM[:29], 3], SYSTEM[:24]]
    limits = {"max_batch": 2, "max_nodes": 8, "max_cached_tokens": 160}
    alone = make_engine(model, **limits, max_shared_tokens=0)
    expected = [*texts(alone.generate(asked, params)), alone.generate(asked[0], GREEDY).token_ids]
    engine = make_engine(model, make[name](), **limits)
    said = texts(engine.generate(asked, params))
    turn = [*asked[1], *said[1], 7]
    assert [*said, engine.generate(asked[0], GREEDY).token_ids] == expected
    assert engine.generate(turn, params).token_ids == alone.generate(turn, params).token_ids
    assert engine.stats.prefix_hits >= (24 if name == "small" else 60)
    for cache in caches(engine):
        check_pools(cache, [])
        assert cache.num_held_pages == 0
