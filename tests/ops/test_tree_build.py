"""Dynamic trees against plain Python, and coupled ranking against the target's own draws."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specrt import _C
from specrt.ops import Purpose, tree_expand, tree_rerank
from specrt.ops.graph import CpuGraph
from specrt.ops.tree_build import expand_gpu_workspace_size, expand_workspace_size
from specrt.sampling import SamplingParams, sampling_row
from tests.ops.conftest import Backend
from tests.ops.test_tree_accept import i32, make_tree, processed, run
from tests.oracles import tree_build as rules

INF, NAN = math.inf, math.nan
CPU = Backend("cpu", torch.device("cpu"))
Tensor = torch.Tensor
POISON = -77


@dataclass
class Frontier:
    tokens: Tensor
    scores: Tensor
    candidates: Tensor
    source: Tensor
    ancestors: Tensor

    @classmethod
    def empty(cls, batch: int, width: int, words: int = 2) -> Frontier:
        ints = torch.full((3, batch, width), POISON, dtype=torch.int32)
        ancestors = torch.full((batch + 1, width, words), POISON, dtype=torch.int64)
        ancestors[batch] = 0  # what lies behind must stay without a bit
        return cls(ints[0], torch.full((batch, width), NAN), ints[1], ints[2], ancestors[:batch])

    def to(self, device: torch.device) -> Frontier:
        behind = self.ancestors._base
        assert behind is not None
        ints = [t.to(device) for t in (self.tokens, self.candidates, self.source)]
        ancestors = behind.to(device)[: len(behind) - 1]
        return Frontier(ints[0], self.scores.to(device), ints[1], ints[2], ancestors)

    @classmethod
    def root(cls, batch: int, words: int = 2) -> Frontier:
        root = cls.empty(batch, 1, words)
        root.scores.zero_()
        root.candidates.fill_(-1)
        root.ancestors.zero_()
        return root


@dataclass
class Pool:
    tokens: Tensor
    parents: Tensor
    scores: Tensor

    @classmethod
    def empty(cls, batch: int, size: int) -> Pool:
        ints = torch.full((2, batch, size), POISON, dtype=torch.int32)
        return cls(ints[0], ints[1], torch.full((batch, size), NAN))

    def to(self, device: torch.device) -> Pool:
        return Pool(self.tokens.to(device), self.parents.to(device), self.scores.to(device))


class Coupling(NamedTuple):
    """As a drafter stages it; words of a row are in csrc/core/sampling_row.h."""

    sampling: Tensor | None
    position: Tensor | None

    @classmethod
    def of(cls, params: list[SamplingParams], positions: list[int]) -> Coupling:
        rows = [sampling_row(p, position) for p, position in zip(params, positions, strict=True)]
        return cls(torch.stack(rows), i32(positions))

    @property
    def seed(self) -> Tensor:
        return self.sampling[:, 5]

    @property
    def top_p(self) -> Tensor:
        return self.sampling.view(torch.float64)[:, 0]

    @property
    def temperature(self) -> Tensor:
        return self.sampling.view(torch.float32)[:, 2]

    @property
    def min_p(self) -> Tensor:
        return self.sampling.view(torch.float32)[:, 3]


UNCOUPLED = Coupling(None, None)


def scratch_of(backend: Backend, batch: int, rows: int, top_k: int) -> Tensor:
    if backend.runs_cuda_source:
        size = expand_gpu_workspace_size(batch, top_k, rows, top_k)
        return torch.zeros(size, device=backend.device)
    return torch.full((2, expand_workspace_size(rows)), NAN)


def expand(
    logits, above, level, pool, below, noise=UNCOUPLED, token_map=None, scratch=None, **kw
) -> None:
    if scratch is None:
        scratch = torch.full((2, expand_workspace_size(logits.shape[-1])), NAN)
    tree_expand(
        logits, above.scores, above.candidates, above.ancestors, token_map, *noise, level, scratch,
        pool.tokens, pool.parents, pool.scores, below.tokens, below.scores, below.candidates,
        below.source, below.ancestors, **kw,
    )  # fmt: skip


def grow(
    levels: list[Tensor], top_k: int, words=2, backend=CPU, noise=UNCOUPLED, token_map=None, **kw
) -> tuple[Pool, list[Frontier]]:
    """``levels[l]`` is ``[B, F, R]``."""
    device, (batch, _, rows) = backend.device, levels[0].shape
    pool = Pool.empty(batch, top_k + len(levels) * top_k * top_k).to(device)
    frontiers = [Frontier.root(batch, words).to(device)]
    there = Coupling(*(t if t is None else t.to(device) for t in noise))
    names = None if token_map is None else token_map.to(device)
    scratch = scratch_of(backend, batch, rows, top_k)
    for level, logits in enumerate(levels):
        below = Frontier.empty(batch, top_k, words).to(device)
        logits = backend.hold(logits)
        expand(logits, frontiers[-1], level, pool, below, there, names, scratch, **kw)
        frontiers.append(below)
    host = CPU.device
    return pool.to(host), [frontier.to(host) for frontier in frontiers[1:]]


def random_levels(batch, top_k, rows, depth, seed=0, scale=3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    levels = [
        torch.randn(batch, 1 if level == 0 else top_k, rows, generator=generator) * scale
        for level in range(depth)
    ]
    for logits in levels:  # ties: a third of each row repeats an earlier entry
        index = torch.randint(0, rows, (rows // 3,), generator=generator)
        logits[:, :, rows - len(index) :] = logits[:, :, index]
    return levels


def masks(ancestors: Tensor) -> list[int]:
    """``[N, W]`` int64 as unsigned integers."""
    return [sum((w % 2**64) << 64 * i for i, w in enumerate(row)) for row in ancestors.tolist()]


def assert_close(got: Tensor, want: list[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(want), rtol=2e-6, atol=2e-6, equal_nan=True)


def assert_growth(levels, top_k, rank, token_map=None, words=2, **kw) -> None:
    """``rank(b, level, row)`` is the oracle's ranking of one node's logits."""
    pool, frontiers = grow(levels, top_k, words, token_map=token_map, **kw)
    names = None if token_map is None else token_map.tolist()
    for b in range(levels[0].shape[0]):
        want = rules.Growth()
        for level, logits in enumerate(levels):
            want.expand([rank(b, level, row) for row in logits[b]], level, 64 * words, names)
            got = frontiers[level]
            width, behind = logits.shape[1], got.ancestors._base
            assert behind is not None and not behind[-1].any()
            assert got.tokens[b].tolist() == [n.token for n in want.frontier]
            assert got.candidates[b].tolist() == [n.candidate for n in want.frontier]
            assert got.source[b].tolist() == [b * width + n.source for n in want.frontier]
            assert masks(got.ancestors[b]) == [n.ancestors for n in want.frontier]
            assert_close(got.scores[b], [n.score for n in want.frontier])
        used = len(want.tokens)
        assert pool.tokens[b, :used].tolist() == want.tokens
        assert pool.parents[b, :used].tolist() == want.parents
        assert_close(pool.scores[b, :used], want.scores)
        assert (pool.tokens[b, used:] == POISON).all() and pool.scores[b, used:].isnan().all()


# --- expand, plain ranking ------------------------------
@pytest.mark.parametrize(
    ("batch", "top_k", "rows", "depth"),
    [
        (1, 1, 1, 2),
        (1, 10, 1000, 4),
        (3, 4, 65, 3),
        (2, 7, 7, 3),
        (1, 10, 4099, 2),
        (1, 40, 300, 4),
    ],
)
@pytest.mark.parametrize("is_mapped", [False, True])
def test_expand_equals_the_oracle(backend: Backend, batch, top_k, rows, depth, is_mapped) -> None:
    levels = random_levels(batch, top_k, rows, depth, seed=rows)
    generator = torch.Generator().manual_seed(1)
    token_map = torch.randperm(9 * rows, generator=generator)[:rows].int() if is_mapped else None
    assert_growth(
        levels, top_k, lambda b, level, row: rules.ranking(row.tolist(), top_k), token_map,
        backend=backend,
    )  # fmt: skip


def test_equal_nodes_tie_by_pool_index(backend: Backend) -> None:
    """Every node has the same four logits, so that whole groups of children tie."""
    levels = [torch.zeros(2, 1, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)]
    for level in levels:
        level[:, :, ::2] = -0.0
    assert_growth(levels, 3, lambda b, level, row: rules.ranking(row.tolist(), 3), backend=backend)


def test_masked_and_broken_logits(backend: Backend) -> None:
    levels = random_levels(6, 5, 70, 3)
    for level in levels:
        level[0, :, 3:] = -INF  # fewer tokens than K
        level[1, 0] = -INF
        level[2, 0, 69] = NAN
        level[3, 0, 0] = INF
        level[4, :, :64] = -INF
    for level in levels[1:]:
        level[5, 1, 64], level[5, 3, 2] = NAN, INF
    assert_growth(levels, 5, lambda b, level, row: rules.ranking(row.tolist(), 5), backend=backend)


def test_scores_do_not_drop_on_large_logits(backend: Backend) -> None:
    logits = torch.zeros(1, 1, 300)
    logits[..., 7] = 3e38
    logits[..., 9] = -3e38
    pool, _ = grow([logits], 2, backend=backend)
    assert pool.tokens[0, :2].tolist() == [7, 0] and pool.scores[0, 0] == 0.0


def test_strided_logits_and_one_word_of_ancestors(backend: Backend) -> None:
    levels = [level.repeat(1, 2, 1)[:, ::2] for level in random_levels(2, 30, 200, 4)]
    rank = rules.ranking
    assert_growth(
        levels, 30, lambda b, level, row: rank(row.tolist(), 30), words=1, backend=backend
    )


# --- coupled ranking ------------------------------
FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "min_p": 0.03},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 0.0},
]
SEEDED = [SamplingParams(seed=-1 - 5 * n, **filters) for n, filters in enumerate(FILTERS)]
POSITIONS = [7, 0, 1000, 2**31 - 9, 5, 6, 7, 8]


def noisy(row: Tensor, p: SamplingParams, position: int, tokens: Tensor | None = None) -> Tensor:
    rows = torch.arange(len(row)) if tokens is None else tokens.long()
    noise = torch.empty(int(rows.max()) + 1)
    # The extension's own: under the shim the wrapper would ask a GPU's.
    _C.gumbel_noise(p.seed % 2**64, position, int(Purpose.TARGET), noise)
    return processed(row, p, [0], 1) + noise[rows]


@pytest.mark.parametrize(
    ("rows", "is_mapped", "scale"),
    [(40, False, 1.0), (40, True, 0.5), (1003, False, 0.5), (1003, True, 1.0)],
)
def test_coupled_ranking_equals_the_oracle(
    backend: Backend, rows: int, is_mapped: bool, scale: float
) -> None:
    batch, top_k = len(SEEDED), 8
    levels = random_levels(batch, top_k, rows, 3, seed=rows)
    generator = torch.Generator().manual_seed(1)
    token_map = torch.randperm(4 * rows, generator=generator)[:rows].int() if is_mapped else None

    def rank(b: int, level: int, row: Tensor) -> rules.Ranking:
        p = SEEDED[b]
        if p.is_greedy:
            return rules.ranking(row.tolist(), top_k)
        row = noisy(row, p, POSITIONS[b] + level, token_map)
        return rules.ranking(row.tolist(), top_k, scale)

    noise = Coupling.of(SEEDED, POSITIONS)
    assert_growth(
        levels, top_k, rank, token_map, noise=noise, noise_scale_temperature=scale, backend=backend
    )


@pytest.mark.parametrize("params", SEEDED, ids=lambda p: str(FILTERS[SEEDED.index(p)]))
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_first_child_is_the_targets_token(
    backend: Backend, params: SamplingParams, scale: float
) -> None:
    """A drafter with the target's logits drafts exactly what the target then draws."""
    batch, rows, prompt_len = 12 if backend.name == "simt" else 40, 5003, 9
    logits = torch.randn(batch, 1, rows, generator=torch.Generator().manual_seed(2)) * scale
    several = [replace(params, seed=seed) for seed in range(batch)]
    pool, _ = grow([logits], 4, backend=backend, noise=Coupling.of(several, [prompt_len] * batch))
    history = [[0] * prompt_len] * batch
    tree = make_tree([[0]] * batch, [[-1]] * batch)
    target = run(tree, logits, several, history, backend=backend)
    assert pool.tokens[:, 0].tolist() == target.tokens[:, 0].tolist()


def test_broken_rows_and_filters_under_coupling(backend: Backend) -> None:
    logits = random_levels(6, 4, 90, 1)[0]
    logits[0, 0, 89], logits[1, 0, 0], logits[2] = NAN, INF, -INF
    noise = Coupling.of([SamplingParams(temperature=1.0, seed=1)] * 6, [3] * 6)
    noise.min_p[3], noise.top_p[4], noise.temperature[5] = 50.0, -3.0, INF
    pool, frontiers = grow([logits], 4, backend=backend, noise=noise)
    assert pool.scores[:3, :4].isnan().all()
    assert (pool.scores[3, :4] == -INF).all()  # min_p > 1 keeps nothing
    assert pool.scores[4, :4].tolist() == [0.0] + [-INF] * 3
    assert pool.scores[5, :4].isfinite().all()
    for b in (0, 1, 2, 3):
        assert pool.tokens[b, :4].tolist() == [0, 1, 2, 3]
        assert frontiers[0].candidates[b].tolist() == [0, 1, 2, 3]


# --- rerank ------------------------------
@dataclass
class Kept:
    draft_tokens: Tensor
    parents: Tensor
    num_nodes: Tensor
    node_scores: Tensor

    @classmethod
    def empty(cls, batch: int, size: int) -> Kept:
        ints = torch.full((2, batch, size), POISON, dtype=torch.int32)
        count = torch.full((batch,), POISON, dtype=torch.int32)
        return cls(ints[0], ints[1], count, torch.full((batch, size), NAN))

    def to(self, device: torch.device) -> Kept:
        return Kept(*(t.to(device) for t in self.tensors()))

    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]


def rerank(pool: Pool, count: int, size: int, roots=None, backend=CPU) -> Kept:
    batch, device = pool.tokens.shape[0], backend.device
    kept, pool = Kept.empty(batch, size).to(device), pool.to(device)
    roots = i32(range(100, 100 + batch)) if roots is None else roots
    tree_rerank(pool.tokens, pool.parents, pool.scores, count, roots.to(device), *kept.tensors())
    return kept.to(CPU.device)


def assert_kept(kept: Kept, b: int, want: rules.Tree) -> None:
    count, size = len(want.tokens), kept.parents.shape[1]
    pad = [0] * (size - count)
    assert kept.num_nodes[b] == count
    assert kept.draft_tokens[b].tolist() == want.tokens + pad
    assert kept.parents[b].tolist() == want.parents + pad
    assert kept.node_scores[b].tolist() == want.scores + [-INF] * len(pad)


@pytest.mark.parametrize("size", [1, 2, 60, 64, 65, 128])
def test_rerank_equals_the_oracle(backend: Backend, size: int) -> None:
    levels = random_levels(3, 6, 50, 4, seed=size)
    levels[0][1, 0, 2:] = -INF
    levels[1][2, 0] = NAN
    pool, _ = grow(levels, 6, backend=backend)
    count = 6 + 3 * 36
    kept = rerank(pool, count, size, backend=backend)
    for b in range(3):
        columns = [t[b, :count].tolist() for t in (pool.tokens, pool.parents, pool.scores)]
        assert_kept(kept, b, rules.rerank(*columns, 100 + b, size))


SCORES = st.sampled_from([0.0, -0.5, -0.5, -1.0, -3.0, -80.0, -INF, NAN])


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    """Any tree; many ties, masked and broken scores."""
    tokens, parents, scores = [], [], []
    for c, step in enumerate(draw(st.lists(SCORES, min_size=1, max_size=40))):
        parents.append(draw(st.integers(-1, c - 1)))
        tokens.append(draw(st.integers(0, 9)))
        scores.append((scores[parents[c]] if parents[c] >= 0 else 0.0) + step)
    return Pool(i32([tokens]), i32([parents]), torch.tensor([scores]))


@settings(deadline=None, max_examples=150)
@given(pools(), st.integers(1, 128))
def test_rerank_keeps_the_best_as_a_connected_tree(pool: Pool, size: int) -> None:
    count = pool.tokens.shape[1]
    kept = rerank(pool, count, size)
    columns = [t[0].tolist() for t in (pool.tokens, pool.parents, pool.scores)]
    assert_kept(kept, 0, rules.rerank(*columns, 100, size))
    used = int(kept.num_nodes)
    scores = kept.node_scores[0, :used].tolist()
    assert scores == sorted(scores, reverse=True)
    assert all(kept.parents[0, j] < j for j in range(used))


def test_rerank_survives_a_pool_that_is_no_tree(backend: Backend) -> None:
    """Parents that were not taken, out of range or later: the node is dropped."""
    scores = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]])
    pool = Pool(i32([[0, 1, 2, 3, 4]]), i32([[-1, 3, 10**9, 1, 0]]), scores)
    kept = rerank(pool, 5, 4, backend=backend)
    assert kept.num_nodes == 2 and kept.draft_tokens.tolist() == [[100, 0, 0, 0]]
    assert rerank(pool, 5, 6, backend=backend).parents.tolist() == [[-1, 0, 1, 0, 0, 0]]


# --- both ------------------------------
class Build:
    """A whole tree's buffers and launches, as a drafter holds them."""

    def __init__(self, levels: list[Tensor], noise: Coupling, top_k=6, size=40) -> None:
        batch, rows = levels[0].shape[0], levels[0].shape[2]
        self.levels, self.noise = levels, noise
        self.count = top_k + (len(levels) - 1) * top_k * top_k
        self.pool, self.kept = Pool.empty(batch, self.count), Kept.empty(batch, size)
        self.frontiers = [Frontier.root(batch)] + [Frontier.empty(batch, top_k) for _ in levels]
        self.scratch = torch.full((3, expand_workspace_size(rows)), NAN)
        self.roots = i32([5] * batch)

    def launch(self) -> None:
        pool = self.pool
        for level, logits in enumerate(self.levels):
            above, below = self.frontiers[level], self.frontiers[level + 1]
            expand(logits, above, level, pool, below, self.noise, scratch=self.scratch)
        tree_rerank(
            pool.tokens, pool.parents, pool.scores, self.count, self.roots,
            *self.kept.tensors(),
        )  # fmt: skip

    def outputs(self) -> list[Tensor]:
        last = self.frontiers[-1]
        pool = [self.pool.tokens, self.pool.parents, self.pool.scores]
        outputs = [*self.kept.tensors(), *pool, last.tokens, last.scores, last.ancestors]
        return [t.clone() for t in outputs]


def launched(levels: list[Tensor], noise: Coupling) -> list[Tensor]:
    build = Build(levels, noise)
    build.launch()
    return build.outputs()


def test_a_graph_reads_the_present_contents() -> None:
    build = Build(random_levels(8, 6, 500, 3), Coupling.of(SEEDED, POSITIONS))
    graph = CpuGraph.capture(build.launch)
    assert graph.num_launches == 7
    for seed in (1, 2):
        for logits, other in zip(build.levels, random_levels(8, 6, 500, 3, seed), strict=True):
            logits.copy_(other)
        build.noise.seed.add_(1)
        build.noise.position.sub_(seed)
        build.noise.temperature.copy_(build.noise.temperature.roll(1))
        build.roots.add_(1)
        before = build.outputs()
        graph.launch()
        launched = build.outputs()
        assert not any(map(equal_bits, before[:1] + before[4:7], launched[:1] + launched[4:7]))
        for t in (build.pool.scores, build.kept.node_scores, build.frontiers[-1].scores):
            t.fill_(NAN)
        build.launch()
        assert all(map(equal_bits, launched, build.outputs()))
        assert (build.kept.draft_tokens[:, 0] == build.roots).all()
    assert (build.kept.num_nodes < 40).any()


def equal_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point():
        a, b = a.view(torch.int32), b.view(torch.int32)
    return torch.equal(a, b)


def test_instruction_sets_threads_and_neighbours_give_the_same_bits() -> None:
    levels = random_levels(8, 6, 9001, 3)
    levels[1][3, 2, 77] = NAN
    noise = Coupling.of(SEEDED, POSITIONS)
    active, threads = _C.active_isa(), torch.get_num_threads()
    want = launched(levels, noise)
    try:
        for isa in _C.build_info()["cpu_isas"]:
            for count in (1, 2, 3, 8):
                _C.set_isa(isa)
                torch.set_num_threads(count)
                assert all(map(equal_bits, launched(levels, noise), want))
    finally:
        _C.set_isa(active)
        torch.set_num_threads(threads)
    for b in (0, 3, 7):
        row = slice(b, b + 1)
        alone = launched([level[row] for level in levels], Coupling(*(t[row] for t in noise)))
        assert all(equal_bits(one, all_[row]) for one, all_ in zip(alone, want, strict=True))


def test_compiles() -> None:
    build = Build(random_levels(2, 6, 100, 1), Coupling.of(SEEDED[:2], [1, 2]))
    want = launched(build.levels, build.noise)
    torch.compile(build.launch, fullgraph=True, backend="aot_eager")()
    assert all(map(equal_bits, build.outputs(), want))


# --- errors ------------------------------
def test_expand_errors_name_the_argument() -> None:
    logits, pool, above, below = (
        torch.zeros(1, 1, 8), Pool.empty(1, 40), Frontier.root(1), Frontier.empty(1, 4),
    )  # fmt: skip
    noise = Coupling.of(SEEDED[:1], [0])

    def refused(match: str, error=ValueError, **kw) -> None:
        given = {"logits": logits, "above": above, "level": 0, "pool": pool, "below": below, **kw}
        with pytest.raises(error, match=match):
            expand(**given)

    refused("logits: expected", logits=logits.double())
    refused("logits: expected F = 1 or 4 at level 1", logits=logits[:, [0, 0]], level=1)
    refused("level: expected", level=-1)
    refused("frontier_tokens: expected 1 <= K <= 8", below=Frontier.empty(1, 9))
    refused("frontier_source: expected", below=replace(below, source=below.source.long()))
    refused("pool_tokens: expected at least 4", pool=Pool.empty(1, 3))
    refused("pool_scores: expected", pool=replace(pool, scores=pool.scores[:, :39]))
    refused("token_map: expected", token_map=i32([0] * 7))
    refused("sampling: expected", noise=noise._replace(sampling=noise.sampling.double()))
    refused("sampling: expected", noise=noise._replace(sampling=noise.sampling[:, :7]))
    wide = noise.sampling.repeat(2, 2)[:, :8]
    refused("sampling: expected", noise=noise._replace(sampling=wide))
    refused("position: expected", noise=noise._replace(position=i32([0, 0])))
    refused("position: expected a tensor", noise=noise._replace(position=None))
    refused("position: expected None", noise=noise._replace(sampling=None))
    refused("noise_scale_temperature: expected", noise=noise, noise_scale_temperature=0.0)
    refused("workspace: expected", scratch=torch.empty(0, expand_workspace_size(8)))
    refused("workspace: expected", scratch=torch.empty(1, expand_workspace_size(8) - 1))
    four = Frontier.empty(1, 4)
    refused("than the frontier that is read", logits=torch.zeros(1, 4, 8), level=1, above=four,
            below=replace(below, scores=four.scores))  # fmt: skip


def test_rerank_errors_name_the_argument() -> None:
    pool = Pool.empty(2, 10)
    with pytest.raises(ValueError, match="pool_tokens: expected at least 11"):
        rerank(pool, 11, 5)
    with pytest.raises(ValueError, match="num_candidates: expected"):
        rerank(pool, -1, 5)
    with pytest.raises(ValueError, match="draft_tokens: expected 1 <= N <= 128"):
        rerank(pool, 10, 129)
    with pytest.raises(ValueError, match="roots: expected"):
        rerank(pool, 10, 5, roots=i32([1]))
