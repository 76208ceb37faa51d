"""Token Recycling: what the table learns, the trees read off it, and that they change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from specrt.cache import CacheBatch
from specrt.draft.base import Budget, DraftParams
from specrt.draft.length.costs import RoundCost
from specrt.draft.recycle.drafter import RecycleDrafter
from specrt.draft.recycle.table import likeliest
from specrt.draft.recycle.template import NUM_RANKS, RATES, make_template
from specrt.models.model import LlamaModel
from specrt.models.step import LOGITS_TAP
from specrt.tree import chain_tree
from specrt.types import AcceptResult, Proposal, SequenceState
from tests.engine.support import make_engine, make_model, prompts, sampled, texts

VOCAB = 97
FREE = RoundCost(slope=0.0)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaModel:
    return make_model(checkpoint)


def state(*token_ids: int, left: int = 50) -> SequenceState:
    return SequenceState(list(token_ids), 1, len(token_ids) + left, 0, 0.0)


def drafter(*states: SequenceState, vocab_size: int = 10) -> RecycleDrafter:
    made = RecycleDrafter(vocab_size)
    for one in states:
        made.start(one)
    return made


def proposal(*rows: Sequence[int]) -> Proposal:
    """Chains of these tokens; only the tokens matter to what is learned."""
    tokens = torch.tensor(rows, dtype=torch.int32)
    sizes = torch.full((len(rows),), tokens.shape[1], dtype=torch.int32)
    return Proposal(tokens, torch.zeros_like(tokens) - 1, sizes)


def outcome(*paths: Sequence[int]) -> AcceptResult:
    width = max(map(len, paths))
    path = torch.tensor([[*p, *[-1] * (width - len(p))] for p in paths], dtype=torch.int32)
    lengths = torch.tensor([len(p) - 1 for p in paths], dtype=torch.int32)
    return AcceptResult(path, lengths, path)


def logits(*orders: Sequence[int], vocab_size: int = 10) -> torch.Tensor:
    """``[1, n, V]``: rows whose likeliest tokens are these, the likeliest first."""
    rows = torch.full((1, len(orders), vocab_size), -100.0)
    for row, order in enumerate(orders):
        rows[0, row, list(order)] = -torch.arange(len(order)).float()
    return rows


def tree_of(made: RecycleDrafter, one: SequenceState, **shape: int) -> list[tuple[int, int]]:
    """(token, parent) of each node."""
    tree = made.propose([one], Budget(64, FREE, DraftParams(**shape)))
    count = int(tree.num_nodes[0])
    return list(
        zip(tree.draft_tokens[0, :count].tolist(), tree.parents[0, :count].tolist(), strict=True)
    )


# --- the template ---------------------------------------------------------------------------------


def chance(template, node: int) -> float:  # type: ignore[no-untyped-def]
    value = 1.0
    while node:
        value *= RATES[template.ranks[node]]
        node = template.parents[node]
    return value


@pytest.mark.parametrize("num_nodes", [1, 2, 8, 64])
def test_the_likeliest_paths_come_first(num_nodes: int) -> None:
    template = make_template(num_nodes, 12, 128)
    assert len(template.parents) == num_nodes
    chances = [chance(template, node) for node in range(num_nodes)]
    assert np.allclose(np.exp(template.scores), chances)
    assert (np.diff(chances) <= 1e-9).all()
    assert all(template.parents[node] < node for node in range(1, num_nodes))
    paths = {(template.parents[n], template.ranks[n]) for n in range(1, num_nodes)}
    assert len(paths) == num_nodes - 1
    # Nothing likelier was left out.
    left_out = [
        chances[node] * RATES[rank]
        for node in range(num_nodes)
        for rank in range(NUM_RANKS)
        if (node, rank) not in paths
    ]
    assert num_nodes == 1 or max(left_out) <= min(chances) * (1 + 1e-6)


def test_a_template_within_bounds() -> None:
    template = make_template(64, 3, 2)
    assert len(template.parents) == 1 + 2 + 4 + 4  # at each depth two nodes have children
    assert template.depth.max() == 3 and template.ranks.max() == 1
    assert len(make_template(64, 0, 8).parents) == 1


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [5, 97, 8193, 20011])
def test_the_likeliest_of_a_row(vocab_size: int) -> None:
    rows = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(0))
    rows[0, -3:] = 50.0 + torch.arange(3)  # in what no whole block holds
    rows[1] = rows[1].sort().values
    expected = rows.argsort(dim=1, descending=True)[:, : min(NUM_RANKS, vocab_size)]
    assert np.array_equal(likeliest(rows), expected.numpy())


def test_a_small_vocabulary_by_hand() -> None:
    """0 is followed by 1 or 2, 1 by 2, 2 by 0; of 3 nothing is known."""
    one = state(3, 0)
    made = drafter(one, vocab_size=5)
    assert tree_of(made, one, total_tokens=8) == [(0, -1)]
    seen = logits([1, 2, 3, 4, 0], [2, 3, 0, 1, 4], [0, 4, 1, 2, 3], vocab_size=5)
    made.observe([one], proposal([0, 1, 2]), outcome([0]), {LOGITS_TAP: seen})
    assert tree_of(made, one, total_tokens=4) == [(0, -1), (1, 0), (2, 1), (0, 2)]
    # Behind 3 nothing is known: it stays a leaf.
    tree = tree_of(made, one, depth=2, top_k=3, total_tokens=64)
    assert sorted(tree[parent][0] for token, parent in tree if parent > 0) == [1, 1, 1, 2, 2, 2]
    assert sorted(token for token, parent in tree if parent == 0) == [1, 2, 3]


@pytest.mark.parametrize(
    ("path", "winner"),
    [
        ([0], 1),  # none of the rows of 7 was accepted: the first of them
        ([0, 2], 2),
        ([0, 3], 3),
        ([0, 1, 3], 3),  # two were: the last
        ([0, 3, 4], 3),
    ],
)
def test_rows_of_one_token(path: list[int], winner: int) -> None:
    one = state(0, 4)
    made = drafter(one)
    seen = logits([7], [1, 9, 5, 6], [2, 9, 5, 6], [3, 9, 5, 6], [8])
    made.observe([one], proposal([4, 7, 7, 7, 6]), outcome(path), {LOGITS_TAP: seen})
    assert tree_of(made, one, depth=2, top_k=1) == [(4, -1), (7, 0), (winner, 1)]


def test_rows_behind_a_tree_and_rows_of_nan_teach_nothing() -> None:
    one, other = state(0, 4), state(0, 5)
    made = drafter(one, other)
    tree = proposal([4, 7], [5, 6])
    tree.num_nodes[0] = 1
    result = outcome([0], [0])
    result.accept_length[1] = -1
    seen = logits([1], [2]).repeat(2, 1, 1)
    made.observe([one, other], tree, result, {LOGITS_TAP: seen})
    assert tree_of(made, one, depth=1, top_k=1) == [(4, -1), (1, 0)]
    for token, known in ((7, one), (5, other), (6, other)):
        known.token_ids[-1] = token
        assert len(tree_of(made, known)) == 1


def test_a_sequence_does_not_learn_from_its_neighbours() -> None:
    one, other = state(0, 4), state(0, 4)
    made = drafter(one, other)
    made.observe([one], proposal([4]), outcome([0]), {LOGITS_TAP: logits([6])})
    assert len(tree_of(made, one, depth=1, top_k=1)) == 2
    assert len(tree_of(made, other)) == 1
    made.finish(one)
    assert len(tree_of(made, other)) == 1  # it began before
    later = state(0, 4)
    made.start(later)
    assert tree_of(made, later, depth=1, top_k=1) == [(4, -1), (6, 0)]
    # What was not learned anew does not undo what another has learned meanwhile.
    made.finish(other)
    again = state(0, 4)
    made.start(again)
    assert tree_of(made, again, depth=1, top_k=1) == [(4, -1), (6, 0)]


def test_logits_of_another_vocabulary() -> None:
    one = state(0, 4)
    made = drafter(one)
    taps = {LOGITS_TAP: logits([1], vocab_size=11)}
    with pytest.raises(ValueError, match="recycle: expected logits of 10 tokens, got 11"):
        made.observe([one], proposal([4]), outcome([0]), taps)


# --- in an engine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [sampled(1), sampled(2, logprobs=True)], ids=["1", "2"])
@pytest.mark.parametrize("max_batch", [1, 4])
def test_the_text_is_plain_decodings(model: LlamaModel, params, max_batch: int) -> None:  # type: ignore[no-untyped-def]
    asked = prompts(6, VOCAB)
    expected = make_engine(model, max_batch=1).generate(asked, params)
    engine = make_engine(model, RecycleDrafter(VOCAB), max_batch=max_batch)
    for shape in (None, DraftParams(total_tokens=12), DraftParams(depth=2, top_k=3)):
        results = engine.generate(asked, params, shape)
        assert texts(results) == texts(expected)
        assert [r.logprobs for r in results] == [r.logprobs for r in expected]
    assert max(result.stats.tau for result in results) > 1.2


def test_measured_costs_say_how_large_a_tree_is(model: LlamaModel) -> None:
    one = state(0, 4)
    made = drafter(one)
    seen = logits(*([n, 1, 2, 3, 4, 5, 6, 7] for n in (8, 9, 0)))
    made.observe([one], proposal([4, 8, 9]), outcome([0, 1, 2]), {LOGITS_TAP: seen})
    sizes = [
        made.propose([one], Budget(64, RoundCost(slope=slope))).draft_tokens.shape[1]
        for slope in (0.0, 0.05, 0.5)
    ]
    assert sizes[0] > 16 > sizes[1] > sizes[2] >= 1
    assert made.propose([one], Budget(5, FREE)).draft_tokens.shape[1] == 5


SCRIPT = """
import torch
from specrt.draft.base import Budget, DraftParams
from specrt.draft.length.costs import RoundCost
from specrt.draft.recycle.drafter import RecycleDrafter
from specrt.types import AcceptResult, SequenceState
made, states = RecycleDrafter(50), [SequenceState([7], 1, 900, 0, 0.0) for _ in range(3)]
for one in states:
    made.start(one)
drafts, generator = [], torch.Generator().manual_seed(0)
for _ in range(30):
    tree = made.propose(states, Budget(64, RoundCost(), DraftParams(total_tokens=24)))
    drafts.append((tree.draft_tokens.tolist(), tree.parents.tolist(), tree.num_nodes.tolist()))
    seen = torch.randn(3, tree.draft_tokens.shape[1], 50, generator=generator)
    path = torch.zeros(3, 1, dtype=torch.int32)
    made.observe(states, tree, AcceptResult(path, path[:, 0], path), {"logits": seen})
    for one in states:
        one.token_ids.append(len(drafts) * 7 % 50)
"""


@pytest.mark.slow
def test_two_processes_draft_alike() -> None:
    here: dict[str, object] = {}
    exec(SCRIPT, here)
    command = [sys.executable, "-c", f"{SCRIPT}\nprint(drafts)"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert there.stdout.strip() == str(here["drafts"])
    assert len(there.stdout) > 1000


def test_logits_are_a_tap_where_a_pass_makes_them(model: LlamaModel) -> None:
    cache = model.new_cache()
    sequence = cache.open()
    cache.reserve(sequence, 8)
    held = CacheBatch(cache, [sequence])
    pieces = list(model.extend([1, 2, 3], held, taps=(LOGITS_TAP, "final")))
    assert [set(taps) for _, taps in pieces] == [{"final"}]
    tree = chain_tree(torch.tensor([[4, 5]], dtype=torch.int32))
    output = model.forward(tree, held, taps=(LOGITS_TAP,))
    assert output.taps[LOGITS_TAP] is output.logits and output.logits.shape == (1, 2, VOCAB)
    assert set(model.forward(tree, held).taps) == set()
