"""EESD among several engines: what they share, what must not mix, and what is given back."""

from __future__ import annotations

import gc
import weakref
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

from specrt.draft.base import Budget, DraftParams
from specrt.draft.eesd.costs import CostMeter
from specrt.draft.length.control import CONTROLLERS
from specrt.draft.length.costs import RoundCost
from specrt.engine.results import GenerationResult
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from tests.checkpoints import make_checkpoint, make_exit_checkpoint
from tests.engine.exits import make_drafter
from tests.engine.support import make_engine, make_model, prompts, sampled, texts

VOCAB, LAYERS = 97, 4
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
PENALISED = sampled(3, repetition_penalty=1.3, presence_penalty=0.4, top_k=20, min_p=0.02)
SETTINGS = (GREEDY, sampled(1), PENALISED)
SHAPES = (None, DraftParams(top_k=2), None, DraftParams(depth=3, top_k=5, total_tokens=17), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eesd")
    make_checkpoint("llama", folder / "target", num_hidden_layers=LAYERS)
    for number in (1, 2):
        make_exit_checkpoint(folder / "target", folder / f"exit-{number}", number, noise=0.1)
    make_exit_checkpoint(folder / "target", folder / "perfect", LAYERS - 1)
    return folder


@pytest.fixture(scope="module")
def float_model(folder: Path) -> LlamaModel:
    return make_model(folder / "target")


@pytest.mark.parametrize(("max_rounds", "sizes"), [(2, (2, 3)), (32, (3, 3))])
def test_streams_of_several_engines_take_turns(
    float_model: LlamaModel,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_rounds: int,
    sizes: tuple[int, int],
) -> None:
    """Caches and workspaces grow and buffers are evicted while other streams are in mid-text;
    greedy, sampled and penalised sequences share batches, join and leave."""
    monkeypatch.setattr("specrt.draft.eesd.sequences._MAX_ROUNDS", max_rounds)
    plain, model = make_engine(float_model), make_model(folder / "target")
    drafter = make_drafter(model, folder / "exit-2")
    engines = [make_engine(model, drafter, max_batch=size) for size in sizes]
    open_streams, expected, num_drafted = [], [], 0
    for number, shape in enumerate(SHAPES):
        asked = prompts(3 + number, VOCAB, seed=number)
        params = [SETTINGS[row % len(SETTINGS)] for row in range(len(asked))]
        open_streams.append(engines[number // 2 % 2].stream(asked, params, shape))
        expected.append(texts(plain.generate(asked, params)))
        for stream in open_streams:  # the older ones are in mid-text
            next(stream)
    said: list[dict[int, GenerationResult]] = [{} for _ in open_streams]
    for chunks in zip_longest(*open_streams):
        for results, chunk in zip(said, chunks, strict=True):
            if chunk is not None and chunk.result is not None:
                results[chunk.index] = chunk.result
                num_drafted += chunk.result.stats.num_draft_tokens
    for found, wanted in zip(said, expected, strict=True):
        assert texts([found[index] for index in range(len(wanted))]) == wanted
    assert num_drafted > 100
    assert drafter._cache.num_free_pages == drafter._cache.num_pages


@pytest.mark.parametrize("kind", CONTROLLERS)
@pytest.mark.parametrize("shape", [*SHAPES[:2], DraftParams(depth=4)], ids=str)
def test_broken_logits_stop_their_own_sequence_alone(
    folder: Path, kind: str, shape: DraftParams | None
) -> None:
    model = make_model(folder / "target")
    model.weights.embed[50] = torch.nan
    asked = [[1, 2, 3], [4, 50, 6], [7, 8], [9], [50]]
    expected = make_engine(model).generate(asked, sampled(3))
    assert [result.finish_reason == "error" for result in expected] == [0, 1, 0, 0, 1]
    drafter = make_drafter(model, folder / "exit-2", kind)
    found = make_engine(model, drafter, max_batch=3).generate(asked, sampled(3), shape)
    assert texts(found) == texts(expected)
    assert [result.error for result in found] == [result.error for result in expected]
    # Nothing of it is left in what all sequences share.
    again = make_engine(model, drafter).generate(asked[:1], sampled(3), shape)
    assert texts(again) == texts(expected[:1])


def test_another_targets_engine(
    float_model: LlamaModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would run its own target's layers in the other one's cache: it is left out."""
    drafter = make_drafter(float_model, folder / "exit-1")
    engine = make_engine(make_model(folder / "target"), drafter)
    result = engine.generate([1, 2, 3], GREEDY)
    assert result.token_ids == make_engine(float_model).generate([1, 2, 3], GREEDY).token_ids
    assert result.stats.num_draft_tokens == 0
    assert "expected an engine of the very target" in caplog.text
    assert drafter._drafts == {}
    drafted = make_engine(float_model, drafter).generate([1, 2, 3], GREEDY)
    assert drafted.stats.num_draft_tokens > 0


def test_a_budget_without_the_targets_cache(float_model: LlamaModel, folder: Path) -> None:
    drafter = make_drafter(float_model, folder / "exit-1")
    with pytest.raises(ValueError, match="got none"):
        drafter.propose([], Budget(64, RoundCost()))


def test_shapes_of_one_batch(float_model: LlamaModel, folder: Path) -> None:
    """Each is asked for by itself, and hears of its own outcome: this exit is never wrong."""
    asked = prompts(5, VOCAB)
    expected = texts(make_engine(float_model).generate(asked, GREEDY))
    drafter = make_drafter(float_model, folder / "perfect", "fixed", draft_len=4)
    engine = make_engine(float_model, drafter, prefill_chunk=5)
    depths = [2, None, 3, None, 2]
    for prompt, depth in zip(asked, depths, strict=True):
        engine.add(prompt, GREEDY, DraftParams(depth=depth))
    results = {}
    while not engine.is_idle:
        results.update({one.handle.id: one.result for one in engine.step() if one.result})
    said = [results[index] for index in sorted(results)]
    assert texts(said) == expected
    for result, depth in zip(said, depths, strict=True):
        assert set(result.stats.accept_lengths[:-1]) == {depth or 4}


def test_sequences_that_gave_way_draft_as_before(float_model: LlamaModel, folder: Path) -> None:
    """They start again from all their tokens: a wrong state would make wrong drafts."""
    asked = prompts(6, VOCAB)[2:]
    params = SamplingParams(max_new_tokens=130, ignore_eos=True)
    expected = texts(make_engine(float_model).generate(asked, params))
    drafter = make_drafter(float_model, folder / "perfect", "fixed", draft_len=4)
    started: list[int] = []
    start = drafter.start
    drafter.start = lambda state: (started.append(len(state.token_ids)), start(state))  # type: ignore
    engine = make_engine(float_model, drafter, max_cached_tokens=400, prefill_chunk=33)
    results = engine.generate(asked, params)
    assert texts(results) == expected
    assert len(started) > len(asked), "nobody gave way"
    assert not set(started) <= {len(prompt) for prompt in asked}
    for result in results:
        assert result.stats.tau > 4.7
    assert drafter._cache.num_held_pages == engine.cache.num_held_pages == 0


def test_an_exit_without_pages(
    float_model: LlamaModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whom there is no page for goes on undrafted; the others draft."""
    params = SamplingParams(max_new_tokens=90, ignore_eos=True)
    asked = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    expected = texts(make_engine(float_model).generate(asked, params))
    drafter = make_drafter(float_model, folder / "exit-2", "fixed")
    drafter._cache.pools[0].max_pages = 4
    results = make_engine(float_model, drafter).generate(asked, params)
    assert texts(results) == expected
    assert "goes on undrafted: MemoryError: KV cache: no memory for 5 pages" in caplog.text
    drafted = [result.stats.num_draft_tokens for result in results]
    assert max(drafted) > 1.3 * min(drafted)
    assert drafter._cache.num_held_pages == 0


def test_a_target_without_pages(float_model: LlamaModel, folder: Path) -> None:
    """Trees are cut to the pages that there are, and are none where a row fills the last one."""
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    expected = make_engine(float_model).generate([1, 2, 3], params)
    drafter = make_drafter(float_model, folder / "perfect", "fixed", draft_len=8)
    engine = make_engine(float_model, drafter, max_cached_tokens=64)
    result = engine.generate([1, 2, 3], params)
    assert result.token_ids == expected.token_ids
    assert result.stats.tau == pytest.approx(60 / 7)


def test_a_gone_engines_cache_is_freed(float_model: LlamaModel, folder: Path) -> None:
    """`bench` and recordings put a new engine around the same drafter, whose cache is its own."""
    drafter = make_drafter(float_model, folder / "exit-2", "fixed")
    caches = []
    for _ in range(4):
        engine = make_engine(float_model, drafter)
        engine.generate([1, 2, 3], GREEDY)
        caches.append(weakref.ref(engine.cache))
    del engine
    gc.collect()
    assert sum(cache() is not None for cache in caches) <= 1


@pytest.mark.parametrize("ms", [0.0, -1e-3])
def test_times_that_cannot_be(float_model: LlamaModel, folder: Path, ms: float) -> None:
    """Of a coarse clock: what is made of them are costs all the same."""
    meter = CostMeter(make_drafter(float_model, folder / "exit-2").exit_model)
    for seen in (ms, 1.0, ms):
        for number in range(12):
            meter.observe_plain(seen)
            meter.observe_draft(seen, seen, seen)
            meter.observe_verify(2 + number % 3, 2, seen)
            for batch in (1, 4):
                assert meter.costs(batch).plain_ms() > 0
