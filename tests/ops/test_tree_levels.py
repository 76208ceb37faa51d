"""A level of a dynamic tree as control sees it: closed sequences, and what a level is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specrt.ops.draft_control import ControlKind
from specrt.sampling import SamplingParams
from tests.ops.conftest import Backend
from tests.ops.control_rounds import Batch
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
    random_levels,
    scratch_of,
)
from tests.ops.test_tree_build_bits import assert_same, on_the_cpu, rows_of, tensors_of
from tests.oracles import tree_build as rules

Tensor = torch.Tensor
TOP_K, ROWS, BATCH = 5, 70, 4
SAMPLED = Coupling.of([SamplingParams(temperature=1.0, seed=3, top_k=9)] * BATCH, [2] * BATCH)


def grown(
    backend: Backend, levels: list[Tensor], is_open: list[list[int]], noise: Coupling = UNCOUPLED
) -> tuple[Pool, list[Frontier], list[Tensor]]:
    """Pool, frontiers and level scores, of levels that are open or not."""
    batch, _, rows = levels[0].shape
    device, top_k = backend.device, max(logits.shape[1] for logits in levels)
    pool = Pool.empty(batch, top_k + len(levels) * top_k * top_k).to(device)
    frontiers, scores = [Frontier.root(batch).to(device)], []
    there = Coupling(*(t if t is None else t.to(device) for t in noise))
    scratch = scratch_of(backend, batch, rows, top_k)
    for level, logits in enumerate(levels):
        below = Frontier.empty(batch, top_k).to(device)
        score = torch.full((batch,), 9.0, device=device)
        kw: dict[str, Any] = {"is_open": i32(is_open[level]).to(device), "level_score": score}
        logits = backend.hold(logits)
        expand(logits, frontiers[-1], level, pool, below, there, None, scratch, **kw)
        frontiers.append(below)
        scores.append(score.cpu())
    if backend.runs_cuda_source and not any(map(any, is_open)):
        assert not scratch.any(), "somebody has worked"
    return pool.to(CPU.device), [f.to(CPU.device) for f in frontiers[1:]], scores


def closed_level(above: Frontier, level: int, b: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, parents and ancestors that a closed sequence's nodes are given."""
    width = above.scores.shape[1]
    parents = [c for c in above.candidates[b].tolist() for _ in range(TOP_K)]
    bits = [int(above.ancestors[b, 0, 0]) | 1 << level * TOP_K + j for j in range(TOP_K)]
    return list(range(TOP_K)) * width, parents, bits


@pytest.mark.parametrize("noise", [UNCOUPLED, SAMPLED], ids=["plain", "coupled"])
def test_closed_sequences_have_children_that_nobody_takes(
    backend: Backend, noise: Coupling
) -> None:
    is_open = [[1, 1, 0, 7], [1, 0, 0, -1], [1, 0, 0, 1]]
    levels = random_levels(BATCH, TOP_K, ROWS, 3)
    levels[1][1], levels[0][2] = NAN, INF  # which nobody reads
    pool, frontiers, scores = grown(backend, levels, is_open, noise)
    for b in (0, 3):  # are what they are alone
        alone = Coupling(*(t if t is None else t[b : b + 1] for t in noise))
        one = grown(backend, [x[b : b + 1] for x in levels], [[1]] * 3, alone)
        assert_same(
            [t[b : b + 1] for t in (pool.tokens, pool.parents, pool.scores)], tensors_of(one[0])
        )
        for got, want in zip(frontiers, one[1], strict=True):
            assert torch.equal(got.scores[b], want.scores[0])
            assert torch.equal(got.ancestors[b], want.ancestors[0])
        assert [score[b] for score in scores] == [score[0] for score in one[2]]
    for b, level in ((1, 1), (1, 2), (2, 0), (2, 1), (2, 2)):
        above = Frontier.root(BATCH) if level == 0 else frontiers[level - 1]
        tokens, parents, bits = closed_level(above, level, b)
        first = 0 if level == 0 else TOP_K + (level - 1) * TOP_K**2
        entries, below = slice(first, first + len(tokens)), frontiers[level]
        assert pool.tokens[b, entries].tolist() == tokens
        assert pool.parents[b, entries].tolist() == parents
        assert (pool.scores[b, entries] == -INF).all() and (below.scores[b] == -INF).all()
        assert below.tokens[b].tolist() == list(range(TOP_K))
        assert below.candidates[b].tolist() == list(range(first, first + TOP_K))
        assert below.source[b].tolist() == [b * above.scores.shape[1]] * TOP_K
        assert below.ancestors[b, :, 0].tolist() == bits
        assert scores[level][b] == -INF


def test_a_level_that_is_closed_for_all_is_no_work(backend: Backend) -> None:
    levels = [torch.full((BATCH, 1 if n == 0 else TOP_K, ROWS), NAN) for n in range(2)]
    pool, _, scores = grown(backend, levels, [[0] * BATCH] * 2, SAMPLED)
    assert (pool.scores[:, : TOP_K + TOP_K**2] == -INF).all()
    assert (torch.stack(scores) == -INF).all()


@pytest.mark.parametrize("top_k", [1, TOP_K, 26])
def test_a_levels_score_is_its_frontiers_share(backend: Backend, top_k: int) -> None:
    """Of rows of all kinds, broken ones too; to the bit the CPU's."""
    levels = [rows_of(6, 1 if n == 0 else top_k, ROWS, n, first_kind=n) for n in range(3)]
    everywhere = [[1] * 6] * 3
    _, frontiers, scores = grown(backend, levels, everywhere)
    above = [torch.zeros(6, 1), *(f.scores for f in frontiers)]
    for level, score in enumerate(scores):
        rows = zip(above[level + 1].tolist(), above[level].tolist(), strict=True)
        want = torch.tensor([rules.level_score(*row) for row in rows])
        torch.testing.assert_close(score, want, rtol=1e-5, atol=2e-6, equal_nan=True)
        assert not (score > 0).any()
    with on_the_cpu():
        assert_same(scores, grown(CPU, levels, everywhere)[2])


def test_no_parent_no_score(backend: Backend) -> None:
    """Where nothing leads to a level, and where the level leads nowhere."""
    levels = random_levels(2, TOP_K, ROWS, 2)
    levels[0][1, 0, 1:] = -INF  # one child, of score 0
    levels[1][1] = -INF
    _, _, scores = grown(backend, levels, [[0, 1], [1, 1]])
    assert scores[0].tolist() == [-INF, 0.0]
    assert scores[1].isnan().all()


# --- the decision


def decided(
    backend: Backend, kind: ControlKind, is_chain: bool, is_apart: bool
) -> list[list[Tensor]]:
    """What control makes of two levels, the tree's scores among them; decided by the levels'
    launches, or by one of its own after each."""
    device, batch = backend.device, Batch.make(6, 4)
    batch.slots[1], batch.limit[2], batch.posterior[4, :2] = -1, 1, 0.3
    batch = batch.to(device)
    batch.decide(kind, 0)
    batch.is_open[5] = 0
    evidence = torch.linspace(-2, 2, 12).view(6, 2)
    evidence[3] = NAN
    evidence = evidence.to(device)
    pool = Pool.empty(6, TOP_K + 2 * TOP_K**2).to(device)
    above, scratch = Frontier.root(6).to(device), scratch_of(backend, 6, ROWS, TOP_K)
    outcome = []
    for level, logits in enumerate(random_levels(6, TOP_K, ROWS, 2, scale=9.0)):
        logits[0, :, 3] = 40.0
        logits[3, :, 7] = NAN if level == 1 else 20.0
        below = Frontier.empty(6, TOP_K).to(device)
        score = below.scores[:, 0] if is_chain else torch.zeros(6, device=device)
        told = (score, evidence) if is_chain else (score,)
        kw: dict[str, Any] = {"is_open": batch.is_open}
        if not is_chain:
            kw["level_score"] = score
        if not is_apart:
            kw["control"] = batch.decision(kind, level + 1, *told)
        expand(logits.to(device), above, level, pool, below, UNCOUPLED, None, scratch, **kw)
        if is_apart:
            batch.decide(kind, level + 1, *told)
        outputs = [*batch.outputs(), batch.num_nodes, below.scores, below.ancestors, score]
        outcome.append([t.cpu().clone() for t in outputs])
        above = below
    return outcome


@pytest.mark.parametrize("is_chain", [False, True])
@pytest.mark.parametrize("kind", list(ControlKind))
def test_a_level_decides_what_a_launch_of_its_own_would(
    backend: Backend, kind: ControlKind, is_chain: bool
) -> None:
    """Of sequences that are open and closed, that stop, that have no posterior, that break."""
    got = decided(backend, kind, is_chain, is_apart=False)
    for here, apart in zip(got, decided(backend, kind, is_chain, is_apart=True), strict=True):
        assert_same(here, apart)
    is_open = [outputs[0].tolist() for outputs in got]
    assert is_open[0][1] == is_open[0][2] == is_open[0][5] == 0 and any(is_open[0])
    assert is_open[1][3] == 0


def test_a_decision_needs_a_level_of_its_batch(backend: Backend) -> None:
    batch = Batch.make(2).to(backend.device)
    above, below = (f.to(backend.device) for f in (Frontier.root(2), Frontier.empty(2, 3)))
    pool, score = Pool.empty(2, 3).to(backend.device), below.scores[:, 0]
    for decision, what in (
        (batch.decision(0, 0), "step: expected at least 1"),
        (batch.decision(0, 1), "score: expected a tensor"),
        (batch.rows([0]).decision(0, 1, score[:1]), r"seed: expected \[B\]"),
        (batch.decision(9, 1, score), "kind: expected"),
    ):
        with pytest.raises(ValueError, match=what):
            expand(
                torch.zeros(2, 1, 8, device=backend.device), above, 0, pool, below,
                scratch=scratch_of(backend, 2, 8, 3), control=decision,
            )  # fmt: skip


def test_a_chain_has_one_node_a_level(backend: Backend) -> None:
    """Each is ranked as a root's children are, where it stands."""
    levels = [level[:, :1] for level in random_levels(BATCH, TOP_K, ROWS, 3)]
    root = Frontier.root(BATCH).to(backend.device)
    scratch = scratch_of(backend, BATCH, ROWS, TOP_K)

    def ranked(level: int, logits: Tensor, places: list[int]) -> list[Tensor]:
        pool, below = Pool.empty(BATCH, TOP_K + 2 * TOP_K**2), Frontier.empty(BATCH, TOP_K)
        pool, below = pool.to(backend.device), below.to(backend.device)
        noise = Coupling(SAMPLED.sampling, i32(places))
        there = Coupling(*(t if t is None else t.to(backend.device) for t in noise))
        expand(backend.hold(logits), root, level, pool, below, there, None, scratch)
        return [below.tokens, below.scores, below.source]

    for level, logits in enumerate(levels):
        assert_same(ranked(level, logits, [2] * BATCH), ranked(0, logits, [2 + level] * BATCH))
