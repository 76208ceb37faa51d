"""What ``linear`` leaves of a draft head's tiles on a GPU, and trees that are grown by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specrt import ops
from specrt.ops import DraftMaxima, LinearPlan
from specrt.sampling import SamplingParams
from tests.ops.conftest import Backend
from tests.ops.test_tree_accept import i32
from tests.ops.test_tree_build import (
    CPU,
    INF,
    NAN,
    UNCOUPLED,
    Coupling,
    Frontier,
    Pool,
    expand,
    scratch_of,
)
from tests.ops.test_tree_build_bits import assert_same, on_the_cpu, rows_of, sampling, tensors_of
from tests.oracles.tile_maxima import Sampling, draft_maxima

Tensor = torch.Tensor
KINDS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.6, seed=-7),
    SamplingParams(temperature=0.8, top_k=5, seed=1),
    SamplingParams(temperature=1e-5, seed=2),
    SamplingParams(temperature=2.0, min_p=0.2, seed=2),
]
NOISE = Coupling.of(KINDS, [2**31 - 1, 3, 5, 6, 7, 8])


@pytest.fixture(autouse=True)
def on_a_gpu(backend: Backend) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("of the CUDA source")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def names_of(rows: int) -> Tensor:
    return torch.randperm(3 * rows, generator=torch.Generator().manual_seed(1))[:rows].int()


def maxima_for(
    backend: Backend, num_rows: int, vocab: int, noise: Coupling, level: int, names: Tensor | None
) -> DraftMaxima:
    tiles = num_rows, -(-vocab // 64)
    told = [None if t is None else t.to(backend.device) for t in (*noise, names)]
    keys = torch.full(tiles, 77, device=backend.device)
    masses = torch.full(tiles, NAN, device=backend.device)
    return DraftMaxima(keys, masses, told[0], told[1], level, told[2])


# One slice of K and two; ragged tiles, and one token.
@pytest.mark.parametrize("noise", [UNCOUPLED, NOISE], ids=["plain", "coupled"])
@pytest.mark.parametrize(
    ("vocab", "depth", "plan"),
    [(200, 40, LinearPlan(64, 3)), (200, 40, LinearPlan(128, 2)), (70, 1032, None), (1, 24, None)],
)
def test_what_a_product_leaves(
    backend: Backend, vocab: int, depth: int, plan: LinearPlan | None, noise: Coupling
) -> None:
    num_rows, names = 12, None if depth == 1032 else names_of(vocab)
    x, weight = random(num_rows, depth), random(vocab, depth, seed=1)
    x[8] *= 1e34  # finite, but not once divided by the temperature
    weight[:, 5] = 0.0
    x[3, 5], weight[vocab - 1, 5] = INF, 1.0  # NaN but for the last
    x[2, 6], weight[vocab // 2, 6] = INF, -1.0
    x, weight = (t.to(backend.device, torch.bfloat16) for t in (x, weight))
    maxima = maxima_for(backend, num_rows, vocab, noise, 4, names)
    logits = torch.full((num_rows, vocab), NAN, device=backend.device)
    ops.linear(x, weight, out=logits, plan=plan, maxima=maxima)
    alone = ops.linear(x, weight, out=torch.empty_like(logits), plan=plan)
    assert torch.equal(logits.view(torch.int32), alone.view(torch.int32))
    on_cpu = replace(maxima, sampling=noise.sampling, position=noise.position, token_map=names)
    keys, masses = draft_maxima(logits.cpu(), on_cpu)
    assert torch.equal(maxima.keys.cpu(), keys)
    told = torch.ones(num_rows, dtype=torch.bool) if noise is UNCOUPLED else torch.arange(12) < 2
    fine = told[:, None] & (keys != -1)
    assert torch.equal(maxima.masses.cpu()[fine].nan_to_num(7), masses[fine].nan_to_num(7))
    assert fine.any() and (keys[3] == -1).any()


def level_of(
    backend: Backend, logits: Tensor, top_k: int, noise: Coupling, names: Tensor | None, **kw
) -> list[Tensor]:
    """A level of ``logits [B, F, R]`` below nodes whose scores are not the same."""
    batch, width, rows = logits.shape
    level, pool = int(width > 1 or top_k == 1), Pool.empty(batch, top_k + top_k**2)
    above = Frontier.root(batch) if width == 1 else Frontier.empty(batch, width)
    above.scores.copy_(-random(batch, width).abs())
    above.candidates.copy_(torch.arange(width))
    pool, above = pool.to(backend.device), above.to(backend.device)
    below = Frontier.empty(batch, top_k).to(backend.device)
    there = Coupling(*(t if t is None else t.to(backend.device) for t in noise))
    token_map = names if names is None else names.to(backend.device)
    scratch = scratch_of(backend, batch, rows, top_k)
    expand(logits.to(backend.device), above, level, pool, below, there, token_map, scratch, **kw)
    if backend.runs_cuda_source:
        zeros = scratch.view(torch.int32)[-batch * (513 * top_k + 1) :]
        assert not zeros.any()
    return [t.cpu() for t in tensors_of(pool, below)]


def check_level(
    backend: Backend, logits: Tensor, top_k: int, noise: Coupling, names: Tensor | None = None
) -> None:
    """By maxima the same tree, on the CPU too; and what they rule out may hold anything."""
    batch, width, rows = logits.shape
    maxima = maxima_for(backend, batch * width, rows, noise, int(width > 1 or top_k == 1), names)
    host = replace(maxima, sampling=noise.sampling, position=noise.position, token_map=names)
    keys, masses = draft_maxima(logits.view(-1, rows), host)
    maxima.keys.copy_(keys)
    maxima.masses.copy_(masses)
    with on_the_cpu():
        want = level_of(CPU, logits, top_k, noise, names)
    assert_same(level_of(backend, logits, top_k, noise, names), want)
    assert_same(level_of(backend, logits, top_k, noise, names, maxima=maxima), want)
    spoilt = logits.clone().view(-1, rows)
    least = (keys ^ -(2**63)).topk(min(top_k, keys.shape[1])).values[:, -1:]
    unread = ((keys ^ -(2**63)) < least).repeat_interleave(64, 1)[:, :rows]
    if noise is not UNCOUPLED:
        filtered = [Sampling.of(words, rows).is_filtered for words in noise.sampling]
        unread = unread.reshape(batch, -1)
        unread[filtered] = False  # of these more is read
    spoilt[unread.reshape(-1, rows)] = NAN
    assert unread.any() or rows < 64 * top_k
    got = level_of(backend, spoilt.view_as(logits), top_k, noise, names, maxima=maxima)
    assert_same(got, want)


@pytest.mark.parametrize(("top_k", "rows"), [(1, 1), (3, 63), (5, 700), (2, 9001), (26, 1800)])
def test_a_plain_level_reads_few_tiles(backend: Backend, top_k: int, rows: int) -> None:
    check_level(backend, rows_of(2, top_k, rows, rows, first_kind=7), top_k, UNCOUPLED)


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize(("top_k", "rows"), [(3, 63), (5, 700), (2, 9001)])
def test_a_coupled_level(backend: Backend, top_k: int, rows: int, is_mapped: bool) -> None:
    kinds = [*KINDS[:4], KINDS[5], SamplingParams(temperature=1.3, top_p=0.9, seed=5)]
    noise = Coupling.of(kinds, [7, 3, 5, 6, 7, 8])
    names = names_of(rows) if is_mapped else None
    check_level(backend, rows_of(6, top_k, rows, rows, first_kind=9), top_k, noise, names)


def test_a_large_vocabulary(backend: Backend) -> None:
    """More tiles than are asked for, and than are listed, at a time."""
    logits = rows_of(3, 1, 140_000, 1, first_kind=10)
    flat = SamplingParams(temperature=1.0, min_p=1e-9, seed=4)
    noise = Coupling.of([SamplingParams(), SamplingParams(temperature=1.0, seed=1), flat], [1] * 3)
    check_level(backend, logits, 2, noise)


def test_all_filters_by_maxima(backend: Backend) -> None:
    rows, batch = 500, 11
    noise, logits = sampling(batch, 1), rows_of(batch, 1, rows, 1, first_kind=10)
    maxima = maxima_for(backend, batch, rows, noise, 0, None)
    host = replace(maxima, sampling=noise.sampling, position=noise.position)
    keys, masses = draft_maxima(logits.view(-1, rows), host)
    maxima.keys.copy_(keys)
    maxima.masses.copy_(masses)
    with on_the_cpu():
        want = level_of(CPU, logits, 6, noise, None)
    assert_same(level_of(backend, logits, 6, noise, None, maxima=maxima), want)


def test_errors_name_the_argument(backend: Backend) -> None:
    x = random(6, 16).to(backend.device, torch.bfloat16)
    weight = random(70, 16).to(backend.device, torch.bfloat16)
    good = maxima_for(backend, 6, 70, NOISE, 0, names_of(70))
    out = torch.empty(6, 70, device=backend.device)
    for wrong, what in (
        ({"keys": good.keys[:, :1]}, r"keys: expected .*ceil\(N / 64\)"),
        ({"masses": good.masses[:, :1]}, r"masses: expected .*ceil\(N / 64\)"),
        ({"position": None}, "position: expected a tensor, as sampling is given"),
        ({"position": i32([1]).to(backend.device)}, r"position: expected \[B\] = \[6\] int32"),
        (
            {"sampling": good.sampling[:4], "position": good.position[:4]},
            "sampling: expected a row",
        ),
        ({"token_map": good.token_map[1:]}, "token_map: expected"),
        ({"level": -1}, "level: expected"),
    ):
        with pytest.raises(ValueError, match=what):
            ops.linear(x, weight, out=out, maxima=replace(good, **wrong))
    for name in ("keys", "masses"):
        wrong = {"maxima": replace(good, **{name: getattr(good, name)[1:]})}
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            level_of(backend, random(6, 1, 70), 3, UNCOUPLED, None, **wrong)
