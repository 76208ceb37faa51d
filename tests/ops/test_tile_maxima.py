"""Keys of logits, as ``linear`` leaves them on a GPU and ``tree_accept`` reads them."""

from __future__ import annotations

import pytest
import torch

from specrt import ops
from specrt.accept import accept
from specrt.ops import LinearPlan, TileMaxima
from specrt.sampling import SamplingParams, SamplingTable
from specrt.types import DraftTree
from tests.ops.conftest import Backend
from tests.ops.test_tree_accept import i32, make_tree, on, scratch_on
from tests.oracles.tile_maxima import tile_maxima

Tensor = torch.Tensor
INF, NAN = float("inf"), float("nan")
KINDS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.6, seed=-7),
    SamplingParams(temperature=0.8, top_k=5, seed=1),
    SamplingParams(temperature=1e-5, seed=2),
    SamplingParams(frequency_penalty=0.5),
]

TOLD = [0, 1, 2, 4]
"""Greedy, or without filters, and unedited: keys tell all."""


@pytest.fixture(autouse=True)
def on_a_gpu(backend: Backend) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("of the CUDA source")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maxima_for(backend: Backend, num_rows: int, vocab: int) -> TileMaxima:
    """One sequence of each kind, on their way up trees of any form."""
    batch = len(KINDS)
    rows = SamplingTable.build(KINDS, [1] * batch, vocab).rows
    depth = torch.arange(num_rows, dtype=torch.int32).view(batch, -1) % 5
    keys = torch.full((num_rows, -(-vocab // 64)), 77)
    tensors = keys, rows, i32([2**31 - 1, -3, 5, 6, 7, 8]), depth
    return TileMaxima(*(tensor.to(backend.device) for tensor in tensors))


def keys_of_product(
    x: Tensor, weight: Tensor, maxima: TileMaxima, plan: LinearPlan | None = None
) -> Tensor:
    """Checked against those of the logits, which are the same bits as without."""
    logits, bias = torch.full((len(x), len(weight)), NAN), random(len(weight), seed=3)
    logits, bias = logits.to(x.device), bias.to(x.device)
    maxima.keys.fill_(77)
    ops.linear(x, weight, bias, out=logits, plan=plan, maxima=maxima)
    alone = ops.linear(x, weight, bias, out=torch.empty_like(logits), plan=plan)
    assert torch.equal(logits.view(torch.int32), alone.view(torch.int32))
    rest = (maxima.sampling, maxima.history_len, maxima.depth)
    expected = tile_maxima(logits.cpu(), *(tensor.cpu() for tensor in rest))
    assert torch.equal(maxima.keys.cpu(), expected)
    return maxima.keys.clone()


# One slice of K and two, and more rows than a launch with slices takes; ragged tiles.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("vocab", "depth", "num_rows"), [(200, 40, 12), (64, 24, 6), (70, 1032, 6), (8, 1032, 264)]
)
def test_keys_are_those_of_the_logits(
    backend: Backend, vocab: int, depth: int, num_rows: int, dtype: torch.dtype
) -> None:
    x = random(num_rows, depth)
    if dtype == torch.bfloat16:
        x[num_rows * 4 // 6] *= 1e34  # finite, but not once divided by the temperature
    x, weight = x.to(backend.device, dtype), random(vocab, depth, seed=1).to(backend.device, dtype)
    weight[vocab // 2] = weight[1]  # a tie, but for the bias
    x[1::4, 3], weight[vocab - 1, 3] = INF, -1.0  # rows of infinities and, times 0, NaN
    weight[: vocab // 2, 3] = 0.0
    keys_of_product(x, weight, maxima_for(backend, num_rows, vocab))


def test_keys_do_not_depend_on_the_plan(backend: Backend) -> None:
    x = random(66, 72).to(backend.device, torch.bfloat16)
    weight = random(200, 72, seed=1).to(backend.device, torch.bfloat16)
    found = [
        keys_of_product(x, weight, maxima_for(backend, 66, 200), LinearPlan(rows, 3))
        for rows in (64, 128)
    ]
    assert torch.equal(*found)


def tree_of(backend: Backend, logits: Tensor) -> DraftTree:
    """0-1-3, 0-2, of what is likely."""
    best = logits.cpu().topk(2).indices.int()
    tokens = torch.stack([best[:, 0, 0], best[:, 0, 0], best[:, 0, 1], best[:, 1, 0]], 1)
    return on(backend, make_tree(tokens.tolist(), [[-1, 0, 0, 1]] * len(tokens)))  # type: ignore[return-value]


@pytest.mark.parametrize("want_logprobs", [False, True])
def test_a_product_and_its_acceptance(backend: Backend, want_logprobs: bool) -> None:
    """The same outcome from keys; what is not read may hold anything, what tells nothing is."""
    batch, vocab = len(KINDS), 200
    x = random(batch * 4, 64).to(backend.device, torch.bfloat16)
    weight = random(vocab, 64, seed=1).to(backend.device, torch.bfloat16)
    table = on(backend, SamplingTable.build(KINDS, [1] * batch, vocab))
    history = torch.ones(batch, 9, dtype=torch.int32, device=backend.device)
    lens = i32([9, 8, 7, 6, 5, 4]).to(backend.device)
    logits = torch.empty(batch, 4, vocab, device=backend.device)
    ops.linear(x, weight, out=logits.view(-1, vocab))
    tree = tree_of(backend, logits)
    keys = torch.empty(batch * 4, 4, dtype=torch.int64, device=backend.device)
    maxima = TileMaxima(keys, table.rows, lens, tree.depth)
    ops.linear(x, weight, out=logits.view(-1, vocab), maxima=maxima)

    def accepted(logits: Tensor, maxima: TileMaxima | None) -> tuple[Tensor, ...]:
        scratch = scratch_on(backend, logits.shape, False)
        found = accept(
            tree, logits, table, history, lens, want_logprobs=want_logprobs, workspace=scratch,
            maxima=maxima,
        )  # fmt: skip
        rest = () if found.logprobs is None else (found.logprobs.nan_to_num(),)
        return found.path, found.accept_length, found.tokens, *rest

    expected = accepted(logits, None)
    assert expected[1].max() == 2
    spoilt = logits.clone()
    if not want_logprobs:
        spoilt[TOLD] = NAN
    for got, want in zip(accepted(spoilt, maxima), expected, strict=True):
        assert torch.equal(got, want)
    keys.fill_(-1)  # NaN in every row
    got = accepted(logits, maxima)
    expected[1][:5] = -1  # all but the one with a penalty
    assert torch.equal(got[1], expected[1])


def test_keys_that_are_none(backend: Backend) -> None:
    """No token below V: the sequence gets nothing."""
    logits = torch.zeros(3, 1, 70, device=backend.device)
    table = on(backend, SamplingTable.build([SamplingParams()] * 3, [1] * 3, 70))
    tree = on(backend, make_tree([[0]] * 3, [[-1]] * 3))
    score = -(0x7FFFFFFF << 32)  # above 0, as the signed number of those 64 bits
    keys = torch.tensor([[score | 2**32 - 1 - 70, 5], [0, 0], [score | 2**32 - 1 - 69, 5]])
    lens = i32([1] * 3).to(backend.device)
    found = accept(
        tree, logits, table, i32([[1]] * 3).to(backend.device), lens,
        workspace=scratch_on(backend, logits.shape, False),
        maxima=TileMaxima(keys.to(backend.device), table.rows, lens, tree.depth),
    )  # fmt: skip
    assert found.accept_length.tolist() == [-1, -1, 0]
    assert found.tokens[2, 0] == 69


def test_errors_name_the_argument(backend: Backend) -> None:
    x = random(6, 16).to(backend.device, torch.bfloat16)
    weight = random(70, 16).to(backend.device, torch.bfloat16)
    good = maxima_for(backend, 6, 70)
    out = torch.empty(6, 70, device=backend.device)
    narrow = TileMaxima(good.keys[:, :1], good.sampling, good.history_len, good.depth)
    few = TileMaxima(good.keys, good.sampling, good.history_len, good.depth[:, :0])
    short = TileMaxima(good.keys, good.sampling, good.history_len[1:], good.depth)
    for maxima, given, what in (
        (narrow, out, r"keys: expected .*ceil\(N / 64\)"),
        (few, out, "depth: expected one for each of 6 rows"),
        (short, out, r"history_len: expected \[B\] = \[6\] int32"),
        (good, out.bfloat16(), "maxima: expected float32 logits"),
    ):
        with pytest.raises(ValueError, match=what):
            ops.linear(x, weight, out=given, maxima=maxima)
