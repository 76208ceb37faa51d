"""Logits by need say what all logits say, and are fewer."""

from __future__ import annotations

import pytest
import torch

from specrt.engine import head_by_need
from specrt.engine.head_by_need import HeadByNeed
from specrt.engine.walks import Walks
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from specrt.types import DraftTree
from tests.engine.support import RandomTreeDrafter, make_engine, prompts, sampled, texts

VOCAB = 97
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
PENALISED = sampled(
    3, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, top_k=20, min_p=0.02
)
SETTINGS = {"greedy": GREEDY, "seed 1": sampled(1), "penalties": PENALISED}


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every head takes part, however small; gives the rows of each pass over it."""
    passes: list[list[int]] = []
    inner = HeadByNeed.multiply

    def multiply(self: HeadByNeed, features: torch.Tensor, wanted: list[int], begin: int) -> None:
        passes.append(wanted)
        inner(self, features, wanted, begin)

    monkeypatch.setattr(head_by_need, "_LEAST_BYTES", 0)
    monkeypatch.setattr(HeadByNeed, "multiply", multiply)
    return passes


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("num_nodes", [16, 65])
def test_random_trees_change_nothing(
    model: LlamaModel, multiplied: list[list[int]], setting: str, num_nodes: int
) -> None:
    params = SETTINGS[setting]
    expected = texts(make_engine(model, max_batch=1).generate(prompts(6, VOCAB), params))
    assert not multiplied, "a lone node is read anyway"
    answers = {tuple(p): a for p, a in zip(prompts(6, VOCAB), expected, strict=True)}
    drafter = RandomTreeDrafter(answers, VOCAB, num_nodes)
    engine = make_engine(model, drafter, max_batch=4, max_nodes=num_nodes)
    results = engine.generate(prompts(6, VOCAB), params)
    assert texts(results) == expected
    assert max(result.stats.tau for result in results) > 1.2
    assert len({len(rows) for rows in multiplied}) > 2, "not one pass of all rows a round"


def test_an_end_in_a_path_and_a_row_that_is_none(
    model: LlamaModel, multiplied: list[list[int]]
) -> None:
    """Sequences of a batch end at different rounds; a NaN row off the path is nobody's."""
    asked = [SamplingParams(max_new_tokens=n, ignore_eos=True, logprobs=True) for n in (1, 9, 23)]
    expected = make_engine(model, max_batch=1).generate(prompts(3, VOCAB), asked)
    answers = {tuple(p): a for p, a in zip(prompts(3, VOCAB), texts(expected), strict=True)}
    engine = make_engine(model, RandomTreeDrafter(answers, VOCAB, 24), max_batch=3, max_nodes=24)
    results = engine.generate(prompts(3, VOCAB), asked)
    assert texts(results) == texts(expected)
    assert [r.logprobs for r in results] == [r.logprobs for r in expected]
    assert multiplied


def test_the_likeliest_come_first_and_what_is_known_never_again() -> None:
    parents = torch.tensor([[-1, 0, 0, 1, 1, 3, 2], [-1, 0, 1, 2, 3, 4, 5]], dtype=torch.int32)
    zeros = torch.zeros_like(parents)
    count = torch.tensor([7, 3], dtype=torch.int32)
    walks = Walks(DraftTree(zeros, parents, zeros, zeros.long(), count))
    first = walks.choose([0, 0], 6)
    # Below 0: 1 (0.7), 3 below it (0.49), and not 2 (0.15).
    assert first == [0, 1, 3, 7, 8, 9]
    walks.know(first)
    assert walks.logit_rows.tolist() == [[0, 1, -1, 2, -1, -1, -1], [3, 4, 5, -1, -1, -1, -1]]
    assert walks.choose([2, -1], 6) == [2, 6]
    assert walks.choose([0, -1], 7) == [5, 2, 4, 6], "all there are"
    assert walks.choose([-1, -1], 8) == []


def test_it_is_measured_which_way_pays(model: LlamaModel) -> None:
    """Rows that cost nothing are multiplied at once, rows that cost as much as weights by need."""
    for row_ms, pays in ((0.0, False), (1.0, True)):
        head = HeadByNeed(model)
        for count in (1, 8, 60) * 20:
            head._cost.observe(count, 10.0 + row_ms * 10.0 * (count - 1))
        chosen = [head._pays_by_need(60) for _ in range(128)]
        assert chosen.count(pays) == 128 - len((2, 16, 64, 128))
