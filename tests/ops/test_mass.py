"""Masses: one exponential for host and lanes, and sums that no order of adding can change."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from specrt import _C
from specrt.sampling import SamplingParams
from tests.ops.test_noise import isa  # noqa: F401  (a fixture)
from tests.ops.test_tree_accept import INF, NAN, make_tree, processed, run
from tests.ops.test_tree_build import grow

ONE = 2**40
every_isa = pytest.mark.usefixtures("isa")


def same_floats(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for what a NaN carries."""
    is_nan = a.isnan()
    bits = [t.masked_fill(is_nan, 0.0).view(torch.int32) for t in (a, b)]
    return torch.equal(is_nan, b.isnan()) and torch.equal(*bits)


def assert_one_exponential(bits: Tensor) -> None:
    """Of the floats with these bits (int32): lanes as scalars, and masses as their floor says."""
    x = bits.view(torch.float32)
    exps, masses = torch.empty(2, len(x)), torch.empty(2, len(x), dtype=torch.int64)
    _C.scalar_exponentials(x, exps[0], masses[0])
    assert torch.equal(exps[0].isnan(), x.isnan())
    below = torch.where(x < 0, exps[0], 1.0)
    assert torch.equal(masses[0], below.double().mul_(ONE).long())
    active = _C.active_isa()
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            _C.exponentials(x, exps[1], masses[1])
            assert same_floats(exps[0], exps[1]) and torch.equal(masses[0], masses[1])
    finally:
        _C.set_isa(active)


def bit_patterns(first: int, last: int, stride: int) -> Tensor:
    return torch.from_numpy(np.arange(first, last, stride).astype(np.uint32).view(np.int32))


def test_lanes_and_scalars_share_one_exponential() -> None:
    borders = torch.tensor([-87.33654, 88.72283, 88.37626, -80.0, -28.0, -27.725887, -0.0, 0.0])
    around = borders.view(torch.int32)[:, None] + torch.arange(-40, 41, dtype=torch.int32)
    assert_one_exponential(around.view(-1))
    assert_one_exponential(torch.tensor([INF, -INF, NAN, 3e38, -3e38]).view(torch.int32))
    assert_one_exponential(bit_patterns(0x80000000, 0xC1A00000, 2017))  # -20 <= x <= -0
    assert_one_exponential(bit_patterns(0, 2**32, 10007))  # NaN of any payload, subnormals


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
def test_of_all_floats_too(part: int) -> None:
    for first in range(part << 28, part + 1 << 28, 2**24):
        assert_one_exponential(bit_patterns(first, first + 2**24, 1))


# --- integers of a row ------------------------------
@pytest.mark.parametrize("total", [1, 2, ONE, 3 * ONE + 7, 2**53 + 1, 2**57 - 1])
@pytest.mark.parametrize("top_p", [NAN, -INF, 0.0, 1e-300, 0.25, 0.9, math.nextafter(1, 0), 1.0, 7])
def test_the_mass_to_keep_and_the_mass_that_is_too_light(top_p: float, total: int) -> None:
    target = _C.nucleus_mass(top_p, total)
    share = top_p * float(total) if top_p > 0 else 0.0
    assert target == (total if share >= float(total) else max(1, math.ceil(share)))
    if top_p < 1:
        for vocab in (1, 7, 128256):
            # All that is light is lighter than what may be missing.
            assert vocab * _C.light_mass(top_p, total, vocab) <= total - target


def test_the_log_of_a_mass() -> None:
    for total in (ONE, ONE + 1, 3 * ONE, 2**57 - 1, 12345 * ONE + 678):
        assert _C.log_of_mass(total) == pytest.approx(math.log(total / ONE), rel=3e-7, abs=1e-12)


# --- sums of a row ------------------------------
def masses_of(row: Tensor) -> list[int]:
    return [_C.mass_of(x) for x in (row - row.max()).tolist()]


def kept_by_integers(row: Tensor, top_p: float) -> list[bool]:
    masses, values = masses_of(row), row.tolist()
    target, before, kept = _C.nucleus_mass(top_p, sum(masses)), 0, [False] * len(row)
    for v in sorted(range(len(row)), key=lambda v: (-values[v], v)):
        kept[v] = before < target
        before += masses[v]
    return kept


def kept(row: Tensor, **filters: float) -> Tensor:
    params = SamplingParams(temperature=1.0, seed=0, **filters)
    return processed(row, params, [0], 1) > -INF


def random_rows(vocab: int) -> Iterator[Tensor]:
    """Peaked, wide, flat, and with many ties; the last with masked tokens."""
    generator = torch.Generator().manual_seed(vocab)
    for scale in (0.01, 1.0, 4.0, 30.0):
        yield torch.randn(vocab, generator=generator) * scale
    ties = torch.randint(-9, 3, (vocab,), generator=generator).float()
    yield ties
    yield ties.masked_fill(torch.rand(vocab, generator=generator) < 0.4, -INF)


TOP_P = [1e-9, 0.3, 0.9, 0.9999, 1 - 1e-12, math.nextafter(1, 0)]


@every_isa
@pytest.mark.parametrize("top_p", TOP_P)
@pytest.mark.parametrize("vocab", [1, 16, 77, 1000])
def test_the_nucleus_is_the_one_by_integers(vocab: int, top_p: float) -> None:
    for row in random_rows(vocab):
        assert kept(row, top_p=top_p).tolist() == kept_by_integers(row, top_p)


@every_isa
@pytest.mark.parametrize("top_p", [0.5, 0.9999])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e30, -7.3])
def test_flat_rows(value: float, top_p: float) -> None:
    row = torch.full((4096,), value)
    assert kept(row, top_p=top_p).tolist() == [v < top_p * 4096 for v in range(4096)]


@every_isa
def test_zeros_of_both_signs_tie() -> None:
    row = torch.zeros(100)
    row[::2] = -0.0
    assert kept(row, top_p=0.3).tolist() == [v < 30 for v in range(100)]


@every_isa
def test_what_has_no_mass_is_neither_kept_nor_drawn() -> None:
    row = torch.tensor([-28.0, 0.0, -27.7, -100.0, -1.0, -INF])
    assert masses_of(row)[2] == 1
    assert kept(row, top_p=math.nextafter(1, 0)).tolist() == [False, True, True, False, True, False]
    assert kept(row, top_k=4, top_p=1 - 1e-15).tolist() == [False, True, True, False, True, False]
    # By rejection: proposed for sure, token 0 is refused, and what is drawn instead has mass.
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(200)]
    law = torch.zeros(200, 2, 6)
    law[:, :, 0] = 1.0
    tree = make_tree([[0, 0]] * 200, [[-1, 0]] * 200, draft_probs=law)
    drawn = run(tree, row.expand(200, 2, 6), params).tokens[:, 0]
    assert set(drawn.tolist()) == {1, 4}


def permutations(vocab: int, count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    for _ in range(count):
        yield torch.randperm(vocab, generator=generator)


@every_isa
@pytest.mark.parametrize("filters", [{"top_p": p} for p in TOP_P] + [{"top_p": 0.9, "top_k": 300}])
def test_the_nucleus_does_not_depend_on_the_order(filters: dict) -> None:
    for row in random_rows(1999):
        want = row[kept(row, **filters)].sort().values
        for order in permutations(len(row), 3):
            other = row[order]
            assert torch.equal(other[kept(other, **filters)].sort().values, want)


def logprob(row: Tensor) -> Tensor:
    result = run(make_tree([[0]], [[-1]]), row[None, None], SamplingParams(), want_logprobs=True)
    return result.logprobs[0]


@every_isa
def test_log_probabilities_do_not_depend_on_the_order() -> None:
    for row in random_rows(5003):
        shuffled = [row] + [row[order] for order in permutations(len(row), 8)]
        assert len({logprob(other).view(torch.int32).item() for other in shuffled}) == 1
        scores = [grow([other[None, None]], 4)[0].scores[0, :4] for other in shuffled]
        assert all(torch.equal(other, scores[0]) for other in scores)
        assert scores[0][0] == logprob(row)
