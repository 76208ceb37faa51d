"""The bundled target on held-out problems: speculation on equals speculation off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

import specrt
from specrt import SamplingParams
from specrt.builtin import heldout_prompts
from specrt.draft.base import Budget, Drafter, EmptyDrafter, RoundCost
from specrt.draft.prompt_lookup import PromptLookupDrafter
from specrt.draft.small_model import SmallModelDrafter
from specrt.engine import Engine
from specrt.graph import GraphCache
from specrt.models.llama import LlamaModel
from specrt.types import DraftTree, SequenceState

SETTINGS = {"greedy": SamplingParams(max_new_tokens=96)} | {
    f"seed {seed}": SamplingParams(max_new_tokens=96, temperature=0.8, top_p=0.95, seed=seed)
    for seed in (1, 2, 3)
}
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module", params=DTYPES)
def bundled(request: pytest.FixtureRequest) -> Engine:
    return specrt.load("builtin", dtype=request.param)


def engine_like(engine: Engine, drafter: Drafter, max_batch: int) -> Engine:
    return Engine(engine.target, drafter, engine.tokenizer, max_batch=max_batch)


class EagerLookup(PromptLookupDrafter):
    """Drafts whatever it costs: measured costs may keep the usual one from drafting at all."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> DraftTree:
        return super().propose(states, Budget(budget.max_nodes, RoundCost(slope=0.0)))


def own_model_drafter(engine: Engine) -> Drafter:
    """The target drafting for itself: slow, but a drafter with a cache and beam trees."""
    graphs = GraphCache()
    model = LlamaModel(engine.target.config, engine.target.weights, graphs.run, graphs.clear)
    return SmallModelDrafter(model, depth=3, width=2)


def check(bundled: Engine, setting: str, prompts: list[str], max_new_tokens: int = 96) -> None:
    params = replace(SETTINGS[setting], max_new_tokens=max_new_tokens)
    expected = engine_like(bundled, EmptyDrafter(), 1).generate(prompts, params)
    contenders: list[tuple[Drafter, int]] = [
        (EmptyDrafter(), 4),
        (PromptLookupDrafter(), 1),
        (EagerLookup(), 1),
        (EagerLookup(), 4),
        (own_model_drafter(bundled), 4),
    ]
    for drafter, max_batch in contenders:
        results = engine_like(bundled, drafter, max_batch).generate(prompts, params)
        differing = [
            sum(a != b for a, b in zip(one.token_ids, two.token_ids, strict=False))
            + abs(len(one.token_ids) - len(two.token_ids))
            for one, two in zip(expected, results, strict=True)
        ]
        assert sum(differing) == 0, (type(drafter).__name__, max_batch, differing)
        if isinstance(drafter, EagerLookup | SmallModelDrafter):
            assert sum(result.stats.num_accepted_tokens for result in results) > 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_sample(bundled: Engine, setting: str) -> None:
    check(bundled, setting, heldout_prompts(4), max_new_tokens=64)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("setting", SETTINGS)
def test_all_problems(bundled: Engine, setting: str) -> None:
    check(bundled, setting, heldout_prompts())


def test_it_writes_solutions(bundled: Engine) -> None:
    results = bundled.generate(heldout_prompts(8), SamplingParams(max_new_tokens=256))
    assert sum("####" in result.text for result in results) >= 6
    assert sum(result.finish_reason == "stop" for result in results) >= 6
