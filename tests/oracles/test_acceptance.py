"""The acceptance rules equal the target's law exactly; planted wrong rules do not."""

from __future__ import annotations

import random
from fractions import Fraction as F

import pytest

from tests.oracles import acceptance as rules


def random_law(rng: random.Random, size: int, zeros: int = 0) -> rules.Law:
    weights = [F(rng.randint(1, 9)) for _ in range(size)]
    for v in rng.sample(range(size), zeros):
        weights[v] = F(0)
    return rules.normalize(weights)


def memory_target(seed: int, size: int, **filters: object) -> rules.Target:
    def target(prefix: tuple[int, ...]) -> rules.Law:
        law = random_law(random.Random(f"{seed}:{prefix}"), size)
        return rules.filtered(law, **filters) if filters else law

    return target


FILTERS = [{}, {"top_k": 2}, {"top_p": F(3, 5)}, {"min_p": F(1, 2)}, {"top_k": 3, "top_p": F(4, 5)}]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_deterministic_trees_keep_the_law(seed: int, filters: dict) -> None:
    target = memory_target(seed, 4, **filters)
    chain = {(): [seed % 4], (seed % 4,): [2]}
    tree = {(): [1, 3, 1], (1,): [0, 2], (3,): [3], (1, 0): [1]}
    for shape in ({}, chain, tree):
        got = rules.one_round(target, rules.sampled_verify, shape, None, 3)
        assert got == rules.plain(target, 3)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_sampled_children_keep_the_law(seed: int, width: int, filters: dict) -> None:
    size = 5 if width < 3 else 4
    target, draft = memory_target(seed, size, **filters), memory_target(seed + 100, size)
    got = rules.over_sampled_children(target, rules.rejection, draft, width, 2)
    assert got == rules.plain(target, 2)


def test_rejection_where_both_laws_have_zeros() -> None:
    rng = random.Random(1)
    for _ in range(50):
        p, q = random_law(rng, 6, 2), random_law(rng, 6, 3)
        got = rules.over_sampled_children(lambda _, p=p: p, rules.rejection, lambda _, q=q: q, 2, 1)
        assert got == rules.plain(lambda _, p=p: p, 1)


def test_equal_laws_always_accept() -> None:
    p = rules.normalize([F(1), F(2), F(3)])
    assert all(child == 0 for _, child, _ in rules.rejection(p, p, [2, 1]))


def test_planted_wrong_rules_fail() -> None:
    target, draft = memory_target(3, 4), memory_target(103, 4)
    want = rules.plain(target, 2)
    wrong = rules.over_sampled_children(target, rules.rejection_without_update, draft, 2, 2)
    assert wrong != want

    masked = memory_target(3, 4, top_k=2)
    closed = rules.over_sampled_children(masked, rules.rejection_closed, draft, 1, 1)
    assert set(closed) > set(rules.plain(masked, 1))  # tokens of probability 0 came out

    unprocessed_bonus = rules.one_round(
        masked, rules.sampled_verify, {(): [0, 1, 2, 3]}, None, 2, bonus=memory_target(3, 4)
    )
    assert unprocessed_bonus != rules.plain(masked, 2)

    # Deterministic top-k children treated as if drawn from q (kernels.md, section 3).
    p = (F(1, 5), F(1, 2), F(3, 10))
    q = (F(3, 5), F(3, 10), F(1, 10))
    biased = rules.one_round(lambda _: p, rules.rejection_without_update, {(): [0, 1]}, lambda _: q, 1)
    assert biased != rules.plain(lambda _: p, 1)
