"""Speculation on equals speculation off, to the last token (design: bit equality)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from specrt.draft.base import Drafter
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from tests.engine.support import RandomTreeDrafter, make_engine, make_model, prompts, sampled, texts

VOCAB = 97
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
PENALISED = sampled(
    3, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, top_k=20, min_p=0.02
)
SETTINGS = {"greedy": GREEDY, "seed 1": sampled(1), "seed 2": sampled(2), "penalties": PENALISED}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def model(request: pytest.FixtureRequest, checkpoint: Path) -> LlamaModel:
    return make_model(checkpoint, request.param)


@pytest.fixture(scope="module")
def plain(model: LlamaModel) -> Callable[[str], list[list[int]]]:
    """Plain decoding's texts of six prompts, one after another, in a setting."""

    @cache
    def answered(setting: str) -> list[list[int]]:
        engine = make_engine(model, max_batch=1)
        return texts(engine.generate(prompts(6, VOCAB), SETTINGS[setting]))

    return answered


each_setting = pytest.mark.parametrize(
    "setting",
    ["greedy", "seed 1", "penalties", pytest.param("seed 2", marks=pytest.mark.slow)],
)


@each_setting
@pytest.mark.parametrize("num_nodes", [2, 8, 16, 33, 64, 65, 128])
def test_random_trees_change_nothing(
    model: LlamaModel, plain: Callable[[str], list[list[int]]], setting: str, num_nodes: int
) -> None:
    params, expected = SETTINGS[setting], plain(setting)
    answers = {tuple(p): a for p, a in zip(prompts(6, VOCAB), expected, strict=True)}
    drafter = RandomTreeDrafter(answers, VOCAB, num_nodes)
    engine = make_engine(model, drafter, max_batch=4, max_nodes=num_nodes)
    results = engine.generate(prompts(6, VOCAB), params)
    assert texts(results) == expected
    # The test would be empty if nothing were ever accepted, or everything.
    taus = [result.stats.tau for result in results]
    assert max(taus) > 1.2
    lengths = {n for result in results for n in result.stats.accept_lengths}
    assert 0 in lengths and len(lengths) > 1


def drafters(model: LlamaModel, checkpoint: Path) -> dict[str, Drafter]:
    return {
        "prompt lookup": PromptLookupDrafter(),
        "wide prompt lookup": PromptLookupDrafter(max_ngram=2, num_continuations=8),
        "small model, chain": SmallModelDrafter(model, depth=5),
        "small model, tree": SmallModelDrafter(make_model(checkpoint, torch.bfloat16), 4, width=5),
    }


@each_setting
@pytest.mark.parametrize("max_batch", [1, 4])
def test_drafters_change_nothing(
    model: LlamaModel,
    plain: Callable[[str], list[list[int]]],
    checkpoint: Path,
    setting: str,
    max_batch: int,
) -> None:
    params, expected = SETTINGS[setting], plain(setting)
    for name, drafter in drafters(model, checkpoint).items():
        engine = make_engine(model, drafter, max_batch=max_batch)
        assert texts(engine.generate(prompts(6, VOCAB), params)) == expected, name


def test_a_model_drafting_for_itself_is_always_right(checkpoint: Path) -> None:
    """The draft cache, its catch-up and its tree positions must then agree with the target's."""
    model = make_model(checkpoint)
    drafter = SmallModelDrafter(make_model(checkpoint), depth=5)
    results = make_engine(model, drafter, max_batch=3).generate(prompts(5, VOCAB), GREEDY)
    for result in results:
        lengths = result.stats.accept_lengths
        assert all(length == 5 for length in lengths[:-1]), lengths


def test_graphs_change_nothing(checkpoint: Path) -> None:
    captured, eager = make_model(checkpoint), make_model(checkpoint, has_graphs=False)
    for params in SETTINGS.values():
        for drafter in (None, PromptLookupDrafter()):
            first, second = (
                texts(make_engine(m, drafter).generate(prompts(5, VOCAB), params))
                for m in (captured, eager)
            )
            assert first == second


def test_threads_change_nothing(checkpoint: Path) -> None:
    model = make_model(checkpoint)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outputs.append(texts(make_engine(model).generate(prompts(4, VOCAB), GREEDY)))
    finally:
        torch.set_num_threads(before)
    assert outputs[0] == outputs[1] == outputs[2]


def test_logits_do_not_depend_on_how_the_prompt_was_cut(checkpoint: Path) -> None:
    from specrt.cache import CacheBatch
    from specrt.tree import chain_tree

    model = make_model(checkpoint)
    ids = [(7 * i) % VOCAB for i in range(200)]
    outcomes = []
    for piece in (1, 3, 50, 128):
        for page_size in (16, 64):
            cache = model.new_cache(page_size)
            batch = CacheBatch(cache, [cache.open(400)])
            for start in range(0, len(ids), piece):
                for _ in model.extend(ids[start : start + piece], batch):
                    pass
            logits = model.forward(chain_tree(torch.tensor([[5]], dtype=torch.int32)), batch).logits
            outcomes.append(logits.clone())
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


def test_logprobs_do_not_change_with_speculation(model: LlamaModel) -> None:
    params = sampled(5, logprobs=True)
    first = make_engine(model).generate(prompts(4, VOCAB), params)
    second = make_engine(model, PromptLookupDrafter()).generate(prompts(4, VOCAB), params)
    for one, other in zip(first, second, strict=True):
        assert one.logprobs == other.logprobs
        assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids)
        assert all(value <= 0.0 for value in one.logprobs)


def test_sampled_drafts_are_accepted_by_rejection(checkpoint: Path) -> None:
    """Same model as target and drafter: p = q, so rejection must accept everything."""
    model = make_model(checkpoint)
    drafter = SmallModelDrafter(make_model(checkpoint), depth=4, is_sampled=True)
    params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=7, ignore_eos=True)
    for result in make_engine(model, drafter).generate(prompts(3, VOCAB), params):
        assert all(length == 4 for length in result.stats.accept_lengths[:-1])
