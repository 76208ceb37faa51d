"""Every bit of a tree on a GPU is the CPU's: rows of all kinds, filters, sizes, levels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from typing import Any

import pytest
import torch

from specrt import _C
from specrt.ops import tree_build
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
    Kept,
    Pool,
    expand,
    grow,
    rerank,
    scratch_of,
)

Tensor = torch.Tensor
KINDS = 12
"""Of rows: see ``row_of``."""
VOCAB = 128_256


def row_of(kind: int, size: int, g: torch.Generator) -> Tensor:
    row = torch.randn(size, generator=g)
    some = torch.randint(0, size, (1 + size // 50,), generator=g)
    if kind == 1:
        return (2 * row).round()  # ties everywhere, both zeros
    if kind == 2:
        return torch.zeros(size).index_fill_(0, some, -0.0)
    if kind == 3:
        return torch.full((size,), -INF).index_copy_(0, some, row[some])
    if kind == 4:
        return torch.full((size,), -INF)
    if kind == 5:
        return row.index_fill_(0, some[:1], NAN)
    if kind == 6:
        return row.index_fill_(0, some[:1], INF)
    if kind == 7:
        return row.index_fill_(0, some, 3e38).index_fill_(0, some[:1] // 2, -3e38)
    if kind == 8:
        return torch.arange(size) * 0.01  # the last are the best
    if kind == 9:
        return torch.arange(size) * -0.3
    if kind == 10:
        return row * 1e-3  # flat
    return row * 4.0


def rows_of(batch: int, width: int, size: int, seed: int, first_kind: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    kinds = range(first_kind, first_kind + batch * width)
    rows = [row_of(kind % KINDS, size, g) for kind in kinds]
    return torch.stack(rows).view(batch, width, size)


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """The extension itself, by its plainest instruction set: another one than ``backend``'s."""
    active, used = _C.active_isa(), tree_build._C
    try:
        tree_build._C = _C
        _C.set_isa("portable")
        yield
    finally:
        tree_build._C = used
        _C.set_isa(active)


def tensors_of(*parts: Any) -> list[Tensor]:
    return [t for part in parts for t in (getattr(part, f.name) for f in fields(part))]


def same(got: Tensor, want: Tensor) -> bool:
    if got.is_floating_point():
        got, want = (t.nan_to_num(nan=12345.0).view(torch.int32) for t in (got, want))
    return torch.equal(got, want)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert same(a, b), (number, (a != b).nonzero().tolist()[:5])


def assert_same_growth(backend: Backend, levels: list[Tensor], top_k: int, **kw: Any) -> None:
    pool, frontiers = grow(levels, top_k, backend=backend, **kw)
    with on_the_cpu():
        cpu_pool, cpu_frontiers = grow(levels, top_k, **kw)
    assert_same(tensors_of(pool, *frontiers), tensors_of(cpu_pool, *cpu_frontiers))


# --- plain ranking


@pytest.mark.parametrize(
    ("top_k", "rows", "depth"),
    [(1, 1, 2), (5, 5, 3), (3, 63, 2), (10, 65, 3), (12, 300, 2), (7, 4095, 2), (4, 9001, 3)],
)
def test_plain_ranking_has_the_cpus_bits(
    backend: Backend, top_k: int, rows: int, depth: int
) -> None:
    levels = [rows_of(3, 1 if n == 0 else top_k, rows, n, first_kind=4 * n) for n in range(depth)]
    assert_same_growth(backend, levels, top_k)


def test_a_row_of_a_large_vocabulary(backend: Backend) -> None:
    logits = rows_of(1, 2, VOCAB, 0, first_kind=11)
    logits[0, 0, VOCAB - 1] = logits.max()  # ties at both ends
    assert_same_growth(backend, [logits[:, :1], logits], 2)


def test_the_largest_k(backend: Backend) -> None:
    """128 children of each of 128 nodes: 16384 candidates for the frontier."""
    levels = [rows_of(1, 1, 130, 0, first_kind=1), rows_of(1, 128, 130, 1)]
    assert_same_growth(backend, levels, 128)


# --- coupled ranking

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 70, "top_p": 0.7},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_p": 0.5, "min_p": 0.1},
    {"min_p": 0.02},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.01},
    {"top_k": 100_000, "top_p": 0.2},
]
TEMPERATURES = (1.0, 0.6, 2.5, 0.01)


def sampling(batch: int, seed: int) -> Coupling:
    """All filters in turn, and each eleventh sequence greedy."""
    params = [
        SamplingParams(temperature=TEMPERATURES[(n + seed) % 4], seed=seed - n, **FILTERS[n % 10])
        if n % 11 < 10
        else SamplingParams()
        for n in range(batch)
    ]
    return Coupling.of(params, [0, 5, 2**31 - 9, 77] * (batch // 4) + [3] * (batch % 4))


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize(("top_k", "rows"), [(3, 40), (6, 1003), (2, 9001)])
def test_coupled_ranking_has_the_cpus_bits(
    backend: Backend, top_k: int, rows: int, is_mapped: bool
) -> None:
    batch, g = 11, torch.Generator().manual_seed(rows)
    levels = [rows_of(batch, 1, rows, 1, first_kind=10), rows_of(batch, top_k, rows, 2)]
    levels = levels[: 1 if rows > 9000 and is_mapped else 2]
    token_map = torch.randint(-(2**31), 2**31, (rows,), generator=g).int() if is_mapped else None
    noise = sampling(batch, rows)
    assert_same_growth(backend, levels, top_k, noise=noise, token_map=token_map)


def test_flat_rows_overflow_the_filters_list(backend: Backend) -> None:
    """More tokens than the list has room for may be kept: 4096."""
    rows, kept = 12_345, ({"top_p": 0.9999}, {"top_k": 9000}, {"top_p": 0.3}, {"top_k": 5000})
    params = [SamplingParams(temperature=1.0, seed=n, **p) for n, p in enumerate(kept)]
    for kind in (10, 1):
        logits = rows_of(4, 1, rows, kind, first_kind=kind)
        logits[1:] = logits[0]
        assert_same_growth(backend, [logits], 5, noise=Coupling.of(params, [1] * 4))


def test_sampling_rows_that_hold_anything(backend: Backend) -> None:
    batch = 8
    noise = sampling(batch, 1)
    noise.min_p[:4] = torch.tensor([50.0, NAN, -1.0, 1.0])
    noise.top_p[:4] = torch.tensor([-3.0, NAN, 0.0, INF], dtype=torch.float64)
    noise.temperature[4:] = torch.tensor([INF, NAN, -1.0, 1e-30])
    levels = [rows_of(batch, 1, 500, 1, first_kind=10), rows_of(batch, 3, 500, 2)]
    assert_same_growth(backend, levels, 3, noise=noise, noise_scale_temperature=1e-3)


# --- one workspace for all calls


def test_tickets_are_zero_after_each_call_and_a_workspace_serves_smaller_ones(
    backend: Backend,
) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("tickets are a GPU's")
    rows, top_k, batch = 4200, 4, 3
    scratch = scratch_of(backend, batch, rows, top_k)
    noise = sampling(batch, 4)
    for b, size in ((3, rows), (1, 700), (2, 4100), (3, rows)):
        there = Coupling(*(t[:b].to(backend.device) for t in noise))
        for level, width in ((0, 1), (1, top_k)):
            logits = rows_of(b, width, size, level, first_kind=10)
            above = Frontier.root(b) if level == 0 else Frontier.empty(b, top_k)
            results = []
            for used in (scratch, scratch_of(backend, b, size, top_k)):
                pool, below = Pool.empty(b, 40), Frontier.empty(b, top_k)
                pool, below = pool.to(backend.device), below.to(backend.device)
                frontier = above.to(backend.device)
                expand(logits.to(backend.device), frontier, level, pool, below, there, None, used)
                zeros = used.view(torch.int32)[-b * (513 * top_k + 1) :]
                assert not zeros.any()
                results.append(tensors_of(pool, below))
            assert_same(*results)


# --- rerank


def random_pool(batch: int, count: int, seed: int) -> Pool:
    """Any parents, before or after; scores with many ties, some broken."""
    g = torch.Generator().manual_seed(seed)
    parents = torch.randint(-1, max(count // 4, 1), (batch, count), generator=g)
    parents[torch.rand(batch, count, generator=g) < 0.05] = 2**31 - 1
    scores = -torch.rand(batch, count, generator=g) * 8
    scores[:, ::3] = scores[:, ::3].round()
    scores[torch.rand(batch, count, generator=g) < 0.05] = NAN
    scores[torch.rand(batch, count, generator=g) < 0.05] = -INF
    tokens = torch.randint(-9, 9, (batch, count), generator=g)
    return Pool(tokens.int(), parents.int(), scores)


@pytest.mark.parametrize(
    ("count", "size"), [(0, 5), (1, 1), (9, 128), (610, 60), (2048, 128), (5000, 128), (1025, 2)]
)
def test_rerank_has_the_cpus_bits(backend: Backend, count: int, size: int) -> None:
    pool = random_pool(3, count + 3, seed=count)
    if count > 2000:  # the worst order: each is better than all before it
        pool.scores[1] = pool.scores[1].nan_to_num(neginf=-9.0).sort().values
    got = rerank(pool, count, size, backend=backend)
    with on_the_cpu():
        want = rerank(pool, count, size)
    assert_same(got.tensors(), want.tensors())


def test_a_chain_as_long_as_the_tree(backend: Backend) -> None:
    count = 127
    tokens, parents = i32([range(count)]), i32([range(-1, count - 1)])
    pool = Pool(tokens, parents, torch.arange(count)[None] * -0.125)
    got = rerank(pool, count, 128, backend=backend)
    assert got.parents[0].tolist() == list(range(-1, count))
    parents[0, 0] = count + 1  # nothing hangs on the root
    assert rerank(pool, count, 128, backend=backend).num_nodes.tolist() == [1]


# --- schedules


def outcome(backend: Backend) -> list[Tensor]:
    levels = [rows_of(5, 1, 9001, 1, first_kind=10), rows_of(5, 3, 9001, 2)]
    noise = sampling(5, 3)
    plain, _ = grow(levels, 3, backend=backend, noise=UNCOUPLED)
    pool, frontiers = grow(levels, 3, backend=backend, noise=noise)
    kept: Kept = rerank(pool, 12, 10, backend=backend)
    return [*astuple(plain), *tensors_of(pool, *frontiers), *kept.tensors()]


@pytest.mark.slow
@pytest.mark.parametrize("resident", [1, 2, 5])
@pytest.mark.parametrize("seed", range(8))
def test_no_schedule_shows(backend: Backend, seed: int, resident: int) -> None:
    with on_the_cpu():
        want = outcome(CPU)
    if backend.name == "simt":
        tree_build._C.set_schedule(seed, resident_blocks=resident)  # type: ignore[attr-defined]
    assert_same(outcome(backend), want)
