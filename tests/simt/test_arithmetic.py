"""The sums of a GPU's tensor cores as the shim models them, and what shows in them."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.oracles.fused_sum import FLOAT32_MIN, HALF_MIN, fused_sum
from tests.simt import _simt
from tests.simt.fragments import multiplied, same

Tensor = torch.Tensor
SUMS = {"sm_80": (8, 24), "sm_90": (16, 25)}  # terms and fractional bits of one sum
SMALLEST = {torch.bfloat16: FLOAT32_MIN, torch.float16: HALF_MIN}
HALF = list(SMALLEST)


def fused(a: Tensor, b: Tensor, c: Tensor, bits: int, smallest: int) -> Tensor:
    """``fused_sum.h``, for a and b ``[sums, n]`` and c ``[sums]``."""
    tensors = {"a": a.float(), "b": b.float(), "c": c, "out": torch.empty_like(c)}
    _simt.run_probe("fused_sums", tensors, [a.shape[1], bits, smallest], block=[len(c)])
    return tensors["out"]


def one(a: list[float], b: list[float], c: float, bits: int = 25) -> float:
    return fused(torch.tensor([a]), torch.tensor([b]), torch.tensor([c]), bits, -126).item()


def operands(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """a, b and c, of sizes that `kind` tells; a tenth are zeros."""
    g = torch.Generator().manual_seed(seed)
    sums, n = shape
    if kind == "any bits":
        words = torch.randint(-(2**15), 2**15, (2, sums, n), generator=g).to(torch.int16)
        c = torch.randint(-(2**31), 2**31, (sums,), generator=g).int().view(torch.float32)
        return [*words.view(dtype), c]
    low, high = {
        "near": (-3, 3),
        "far": (-14, 12),
        "subnormal": (-24, -12) if dtype == torch.float16 else (-133, 0),
        "large": (8, 15) if dtype == torch.float16 else (55, 66),
    }[kind]
    scale = torch.randint(low, high + 1, (2, sums, n), generator=g)
    x = (torch.randn(2, sums, n, generator=g).double() * 2.0**scale).to(dtype)
    x *= torch.rand(x.shape, generator=g) > 0.1
    exponent = torch.randint(2 * low, 2 * high + 1, (sums,), generator=g)
    c = (torch.randn(sums, generator=g).double() * 2.0**exponent).float()
    c[::5] = (-x[0, ::5, 0].double() * x[1, ::5, 0].double()).float()  # cancels the first product
    c[1::9], c[2::9] = 0.0, -0.0
    return [*x, c]


@pytest.mark.parametrize("gpu", SUMS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["near", "far", "subnormal", "large", "any bits"])
def test_a_sum_is_the_models(kind: str, dtype: torch.dtype, gpu: str) -> None:
    n, bits = SUMS[gpu]
    a, b, c = operands(kind, (256, n), dtype, seed=n)
    out = fused(a, b, c, bits, SMALLEST[dtype])
    rows = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    want = torch.tensor([fused_sum(*row, bits, SMALLEST[dtype]) for row in rows])
    assert same(out, want)
    assert out.isfinite().any()


def test_what_truncation_takes() -> None:
    quarter = 2.0**-13
    assert one([quarter], [-quarter], 1.0) == 1.0  # -2^-26 is past 25 bits
    assert one([quarter], [-2 * quarter], 1.0) == 1 - 2.0**-24  # -2^-25 is not; no rounding up
    assert one([quarter], [-2 * quarter], 1.0, bits=24) == 1.0
    assert one([1.5], [1.5], -(2.0**-25)) == 2.25 - 2.0**-22  # the product's exponent is 0, not 1
    assert one([1.5], [1.5], -(2.0**-26)) == 2.25
    # Each term by itself: four are 2^-24 together.
    assert one([2.0**-13] * 4, [-(2.0**-13)] * 4, 1.0) == 1.0
    assert one([2.0**-12] * 4, [2.0**-13] * 4, 1.0) == 1 + 2.0**-23


def test_zeros_and_infinities() -> None:
    largest = torch.finfo(torch.float32).max
    vanished = [(-(2.0**-149), 0.0, 8.0), (0.0, -(2.0**-75), 2.0**-75)]  # aligning, and at the end
    for c, a, b in [(-0.0, 0.0, -1.0), (1.0, -1.0, 1.0), (-0.0, -0.0, 0.0), *vanished]:
        out = one([a], [b], c)
        assert out == 0.0 and math.copysign(1, out) == 1
    assert one([2.0**100], [2.0**3], largest) == largest  # truncated, not rounded up
    assert one([2.0**100], [2.0**27], largest) == math.inf
    assert one([-(2.0**70)], [2.0**70], 0.0) == -math.inf
    assert one([math.inf, 1.0], [2.0, 1.0], -largest) == math.inf
    for a, c in [(math.inf, -math.inf), (math.nan, 0.0), (0.0, math.nan)]:
        assert math.isnan(one([a], [1.0], c))
    assert math.isnan(one([math.inf], [0.0], 0.0))


@pytest.mark.parametrize("gpu", SUMS)
@pytest.mark.parametrize("dtype", HALF)
def test_mma_is_its_gpus_sums(dtype: torch.dtype, gpu: str) -> None:
    depth, bits = SUMS[gpu]
    a, b, _ = operands("subnormal", (16, 16), dtype, seed=1)
    a[0], b[0] = operands("near", (1, 16), dtype, seed=2)[:2]
    c = 2.0**-20 * torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    want = c.clone()
    for row in range(16):
        for column in range(8):
            x, y, z = a[row].tolist(), b[column].tolist(), c[row, column].item()
            for k in range(0, 16, depth):
                z = fused_sum(x[k : k + depth], y[k : k + depth], z, bits, SMALLEST[dtype])
            want[row, column] = z
    _simt.set_arithmetic(gpu)
    assert same(multiplied(a, b[:8].T, c), want)


def test_an_unknown_arithmetic_is_named() -> None:
    with pytest.raises(ValueError, match=r"^arithmetic: expected ieee, sm_80 or sm_90, got sm_75"):
        _simt.set_arithmetic("sm_75")


# --- kernels that are row invariant in one arithmetic and not in another --------------------------


def keys_at(places: list[int], x: Tensor) -> Tensor:
    """x's rows (keys) at these rows of as many groups of 16 as it takes; all else zero."""
    out = torch.zeros(-(-(max(places) + 1) // 16) * 16, x.shape[1], dtype=x.dtype)
    out[places] = x
    return out


def permuted(groups: int, within: int) -> list[int]:
    """Places of 16 * `groups` keys, each run of `within` of them in an order of its own."""
    rng = random.Random(within)
    return [
        start + i
        for start in range(0, 16 * groups, within)
        for i in rng.sample(range(within), within)
    ]


PLANTED: dict[str, tuple[list[int], str | None, set[str]]] = {
    # How another row of the same keys is computed; in which arithmetics its bits are the same.
    "elsewhere in the group": ([4 + i for i in range(12)], None, {"ieee", "sm_90"}),
    "another order within 16": (permuted(2, 16), None, {"sm_90"}),
    "another order within 8": (permuted(2, 8), None, {"sm_80", "sm_90"}),
    "moved by half a group": ([8 + i for i in range(24)], None, {"sm_80"}),
    "another order across groups": ([*range(16, 32), *range(16)], None, set()),
    "added afterwards": (list(range(32)), "multiply_bf16_apart", {"ieee"}),
}


@pytest.mark.parametrize("arithmetic", ["ieee", *SUMS])
@pytest.mark.parametrize("fault", PLANTED)
def test_what_another_order_shows(fault: str, arithmetic: str) -> None:
    places, kernel, is_same_in = PLANTED[fault]
    g = torch.Generator().manual_seed(6)
    p, v = (torch.randn(len(places), n, generator=g).bfloat16() for n in (16, 8))
    c = torch.randn(16, 8, generator=g)
    _simt.set_arithmetic(arithmetic)
    for x, y, is_exact in ((p, v, False), ((4 * p).round(), (4 * v).round(), True)):
        start = c.round() if is_exact else c
        plain = keys_at(list(range(len(places))), x).T, keys_at(list(range(len(places))), y)
        moved = keys_at(places, x).T, keys_at(places, y)
        is_same = torch.equal(multiplied(*plain, start), multiplied(*moved, start, kernel))
        assert is_same == (is_exact or arithmetic in is_same_in)  # small integers show nothing


# --- what a product of zero changes ---------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["ieee", *SUMS])
@pytest.mark.parametrize("dtype", HALF)
def test_products_of_zero_change_nothing(dtype: torch.dtype, arithmetic: str) -> None:
    """But the sign of a zero. Half: from 2^-112 on, whatever the other factors are."""
    g = torch.Generator().manual_seed(7)
    limit = 15 if dtype == torch.float16 else 40
    v = torch.randn(16, 8, generator=g) * 2.0 ** torch.randint(-14, limit - 2, (16, 8), generator=g)
    c = torch.randn(16, 8, generator=g) * 2.0 ** torch.randint(-80, 100, (16, 8), generator=g)
    c[0, 0] = -0.0
    _simt.set_arithmetic(arithmetic)
    out = multiplied(torch.zeros(16, 16).to(dtype), v.to(dtype), c)
    assert torch.equal(out, c)
    assert torch.signbit(out[0, 0]) == (arithmetic == "ieee")


@pytest.mark.parametrize("gpu", SUMS)
@pytest.mark.parametrize("exponent", [-20, 0, 2, 15, 100, 127])
def test_a_zero_beside_a_huge_factor_takes_bits(exponent: int, gpu: str) -> None:
    """0 * 2^e counts as 2^(e - 126): an accumulator below 2^(e - 103 - bits) loses last bits."""
    _, bits = SUMS[gpu]
    kept = max(exponent - 103 - bits, -126)
    full = 2 - 2.0**-23  # all 24 bits
    assert one([0.0], [2.0**exponent], full * 2.0**kept, bits) == full * 2.0**kept
    if kept > -126:
        lost = full * 2.0 ** (kept - 1)
        assert one([0.0], [2.0**exponent], lost, bits) == lost - 2.0 ** (kept - 24)
