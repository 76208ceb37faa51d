"""The acceptance rules equal the target's law exactly; planted wrong rules do not."""

from __future__ import annotations

import random
from fractions import Fraction as F

import pytest

from tests.oracles import acceptance as rules

FILTERS = [{}, {"top_k": 2}, {"top_p": F(3, 5)}, {"min_p": F(1, 2)}, {"top_k": 3, "top_p": F(4, 5)}]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_deterministic_trees_keep_the_law(seed: int, filters: dict) -> None:
    target = rules.memory_target(seed, 4, **filters)
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
    target = rules.memory_target(seed, size, **filters)
    draft = rules.memory_target(seed + 100, size)
    got = rules.over_drawn_trees(target, rules.rejection, draft, [width], 2)
    assert got == rules.plain(target, 2)


@pytest.mark.parametrize(("widths", "zeros"), [((2, 2), 0), ((3, 2), 1)], ids=str)
def test_trees_of_sampled_children_keep_the_law(widths: tuple[int, ...], zeros: int) -> None:
    target, draft = rules.memory_target(7, 3), rules.memory_target(8, 3, zeros)
    length = len(widths) + 1
    got = rules.over_drawn_trees(target, rules.rejection, draft, widths, length)
    assert got == rules.plain(target, length)


def test_a_child_that_its_law_excludes_changes_nothing() -> None:
    p, q = (F(1, 5), F(1, 2), F(3, 10)), (F(3, 5), F(2, 5), F(0))
    without = rules.rejection(p, q, [0, 1])
    among = rules.rejection(p, q, [2, 0, 2, 1])
    place = {1: 0, 3: 1, None: None}  # of a child among all: without those
    assert [(v, place[child], mass) for v, child, mass in among] == without


def test_rejection_where_both_laws_have_zeros() -> None:
    rng = random.Random(1)
    for _ in range(50):
        p, q = rules.random_law(rng, 6, 2), rules.random_law(rng, 6, 3)
        got = rules.over_drawn_trees(lambda _, p=p: p, rules.rejection, lambda _, q=q: q, [2], 1)
        assert got == rules.plain(lambda _, p=p: p, 1)


def test_equal_laws_always_accept() -> None:
    p = rules.normalize([F(1), F(2), F(3)])
    assert all(child == 0 for _, child, _ in rules.rejection(p, p, [2, 1]))


def test_planted_wrong_rules_fail() -> None:
    target, draft = rules.memory_target(3, 4), rules.memory_target(103, 4)
    want = rules.plain(target, 2)
    wrong = rules.over_drawn_trees(target, rules.rejection_without_update, draft, [2], 2)
    assert wrong != want

    # Here the second sibling is neither accepted nor rejected for sure.
    p, q = (rules.normalize([F(n) for n in law]) for law in ((3, 9, 1, 5), (5, 6, 16, 9)))
    one_uniform = rules.over_drawn_trees(
        lambda _: p, rules.rejection_by_one_uniform, lambda _: q, [2], 1
    )
    assert sum(one_uniform.values()) == 1 and one_uniform != rules.plain(lambda _: p, 1)

    masked = rules.memory_target(3, 4, top_k=2)
    closed = rules.over_drawn_trees(masked, rules.rejection_closed, draft, [1], 1)
    assert set(closed) > set(rules.plain(masked, 1))  # tokens of probability 0 came out

    unprocessed_bonus = rules.one_round(
        masked, rules.sampled_verify, {(): [0, 1, 2, 3]}, None, 2, bonus=rules.memory_target(3, 4)
    )
    assert unprocessed_bonus != rules.plain(masked, 2)

    # Deterministic top-k children treated as if drawn from q (kernels.md, section 3).
    p = (F(1, 5), F(1, 2), F(3, 10))
    q = (F(3, 5), F(3, 10), F(1, 10))
    biased = rules.one_round(
        lambda _: p, rules.rejection_without_update, {(): [0, 1]}, lambda _: q, 1
    )
    assert biased != rules.plain(lambda _: p, 1)
