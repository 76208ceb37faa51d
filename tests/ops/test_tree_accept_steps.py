"""Walks that stop and go on: where logits come by need, and where threads share a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from specrt import _C
from specrt.accept import accept, empty_result
from specrt.ops.tree_accept import workspace_size
from specrt.sampling import SamplingParams, SamplingTable
from specrt.types import AcceptResult, DraftTree

NODES, SMALL, LARGE = 12, 97, 33_000  # the latter: rows that threads share, in four slices
HISTORY = torch.tensor([[3, 5, 3, 9, 0], [7, 7, 1, 2, 6]], dtype=torch.int32)
HISTORY_LEN = torch.tensor([5, 4], dtype=torch.int32)
MODES = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "temperature": {"temperature": 1.3},
    "top_p": {"temperature": 0.9, "top_p": 0.9, "logprobs": True},
    "wide top_p": {"temperature": 1.5, "top_p": 0.999, "repetition_penalty": 1.2},
    "top_k, top_p": {"temperature": 1.1, "top_k": 40, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "top_p": 0.95, "min_p": 0.05, "logit_bias": {4: 1.5}},
}


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.active_isa()
    try:
        _C.set_isa(request.param)
    except ValueError:
        pytest.skip("this CPU lacks it")
    yield request.param
    _C.set_isa(before)


PARENTS = (-1, 0, 0, 1, 1, 2, 3, 3, 6, 6, 8, 9)
CHAIN = {0: 1, 1: 3, 3: 6, 6: 8, 8: 10}  # a node's first child


def made(mode: str, vocab: int) -> tuple[DraftTree, torch.Tensor, SamplingTable]:
    """Sequence 0's first children are what the target says; sequence 1's the first two."""
    torch.manual_seed(len(mode))
    logits = torch.randn(2, NODES, vocab) * 2
    params = SamplingParams(**{"seed": 11, **MODES[mode]})
    table = SamplingTable.build([params, replace(params, seed=12)], [2, 3], vocab)
    tokens = torch.randint(0, vocab, (2, NODES), dtype=torch.int32)
    zeros, parents = torch.zeros_like(tokens), torch.tensor([PARENTS] * 2, dtype=torch.int32)
    count = torch.tensor([NODES, NODES - 1], dtype=torch.int32)
    tree = DraftTree(tokens, parents, zeros, zeros.long(), count)
    for _ in CHAIN:
        said = whole(tree, logits, table)
        for b, length in enumerate(said.accept_length.tolist()):
            child = CHAIN.get(int(said.path[b, length]), 0)
            if child and (b == 0 or length < 2):
                tokens[b, child] = said.tokens[b, length]
    return tree, logits, table


def by_need(tree: DraftTree, logits: torch.Tensor, table: SamplingTable) -> AcceptResult:
    """Each node's logits are there when they were asked for; nothing but NaN behind them."""
    batch, nodes, vocab = logits.shape
    rows = torch.full((batch * nodes, vocab), torch.nan)
    logit_rows = torch.full((batch, nodes), -1, dtype=torch.int32)
    next_node = torch.zeros(batch, dtype=torch.int32)
    result = empty_result(tree, table.want_logprobs)
    num_calls = num_known = 0
    while (next_node >= 0).any():
        for b, node in enumerate(next_node.tolist()):
            if node >= 0:
                assert logit_rows[b, node] < 0, "asked for what is there"
                rows[num_known], logit_rows[b, node] = logits[b, node], num_known
                num_known += 1
        accept(
            tree, rows[:num_known], table, HISTORY, HISTORY_LEN, want_logprobs=table.want_logprobs,
            out=result, logit_rows=logit_rows, next_node=next_node,
        )  # fmt: skip
        num_calls += 1
    assert num_calls == result.accept_length.max() + 1
    assert num_known == (result.accept_length + 1).sum()
    return result


def whole(tree: DraftTree, logits: torch.Tensor, table: SamplingTable) -> AcceptResult:
    """By one thread a sequence, as there is scratch for one walk at a time."""
    if table.workspace is not None:
        table = replace(table, workspace=torch.full((1, workspace_size(table.vocab_size)), 7.0))
    return accept(
        tree, logits, table, HISTORY, HISTORY_LEN, want_logprobs=table.want_logprobs
    )  # fmt: skip


def assert_equal(got: AcceptResult, expected: AcceptResult) -> None:
    for name in ("path", "accept_length", "tokens"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    if expected.logprobs is not None:
        bits = (x.logprobs.view(torch.int32) for x in (got, expected))
        assert torch.equal(*bits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_logits_by_need_give_the_same_path(mode: str, vocab: int) -> None:
    tree, logits, table = made(mode, vocab)
    expected = whole(tree, logits, table)
    assert expected.accept_length.min() >= 2
    assert_equal(by_need(tree, logits, table), expected)


def test_rejection_by_need() -> None:
    tree, logits, table = made("top_p", SMALL)
    tree = replace(tree, draft_probs=(logits * 0.7).softmax(-1))
    expected = whole(tree, logits, table)
    assert_equal(by_need(tree, logits, table), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threads", [1, 2])
def test_shared_rows_have_the_bits_of_one_threads(mode: str, threads: int) -> None:
    tree, logits, table = made(mode, LARGE)
    expected = whole(tree, logits, table)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = accept(tree, logits, table, HISTORY, HISTORY_LEN, want_logprobs=table.want_logprobs)
    finally:
        torch.set_num_threads(before)
    assert_equal(got, expected)


def test_shared_rows_on_every_instruction_set(isa: str) -> None:
    tree, logits, table = made("wide top_p", LARGE)
    _C.set_isa("portable")
    expected = whole(tree, logits, table)
    _C.set_isa(isa)
    assert_equal(accept(tree, logits, table, HISTORY, HISTORY_LEN), expected)


def test_a_path_longer_than_launches_are_made_for() -> None:
    """And a bad row at its end, which ends that sequence alone."""
    nodes, vocab = 20, LARGE
    torch.manual_seed(0)
    logits = torch.randn(2, nodes, vocab)
    tokens = torch.arange(nodes, dtype=torch.int32).repeat(2, 1)
    logits[:, torch.arange(nodes - 1), torch.arange(1, nodes)] = 30.0
    logits[1, -1, 5] = torch.nan
    chain = torch.arange(-1, nodes - 1, dtype=torch.int32).repeat(2, 1)
    count = torch.tensor([nodes, nodes], dtype=torch.int32)
    tree = DraftTree(tokens, chain, torch.zeros_like(tokens), tokens.long(), count)
    table = SamplingTable.build([SamplingParams(temperature=1.0, seed=1)] * 2, [1, 1], vocab)
    got = accept(tree, logits, table, HISTORY, HISTORY_LEN)
    assert got.accept_length.tolist() == [nodes - 1, -1]
    assert got.tokens[0, :-1].tolist() == list(range(1, nodes)) and (got.tokens[1] == -1).all()
    assert_equal(got, whole(tree, logits, table))


def test_what_goes_together_is_named() -> None:
    tree, logits, table = made("greedy", SMALL)
    rows = torch.zeros(2, NODES, dtype=torch.int32)
    with pytest.raises(ValueError, match="next_node"):
        accept(tree, logits.flatten(0, 1), table, HISTORY, HISTORY_LEN, logit_rows=rows)
    with pytest.raises(ValueError, match="logits: expected \\[R, V\\]"):
        accept(
            tree, logits, table, HISTORY, HISTORY_LEN, logit_rows=rows,
            next_node=torch.zeros(2, dtype=torch.int32),
        )  # fmt: skip
