"""``linear`` on a GPU: the padding on any device, cuBLAS' bits where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.linear_rows import SHAPES, Shape, random_inputs
from specrt import ops
from specrt.models.row_check import Linear, differing_rows
from specrt.ops.linear import (
    GEMM_ROWS,
    Product,
    check_gpu_linear,
    gpu_product,
    linear_in_pieces,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Tensor = torch.Tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def row_by_row(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """A product whose rows do not depend on one another: specrt's own on the CPU."""
    assert x.shape[0] == out.shape[0] == GEMM_ROWS and out.dtype == torch.float32
    ops.linear(x.float(), weight, out=out)


def padded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    product: Product = row_by_row,
) -> Tensor:
    out = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype) if out is None else out
    linear_in_pieces(x, weight, bias, residual, out, None, product)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 127, 128, 129, 256, 300])
def test_every_row_goes_through(dtype: torch.dtype, rows: int) -> None:
    x, weight = random(rows, 40, dtype=dtype), random(24, 40, seed=1, dtype=dtype)
    bias, residual = random(24, seed=2), random(rows, 24, seed=3, dtype=dtype)
    exact = x.double() @ weight.double().T + bias.double() + residual.double()
    out = padded(x, weight, bias, residual)
    # One rounding to the output's dtype, and float32's in the sums.
    bound = torch.finfo(dtype).eps * exact.abs() / 2 + 1e-5
    assert ((out.double() - exact).abs() <= bound).all()
    in_place = residual.clone()
    padded(x, weight, bias, in_place, out=in_place)
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_number_or_place(dtype: torch.dtype) -> None:
    x, weight = random(300, 64, dtype=dtype), random(33, 64, seed=1, dtype=dtype)
    alone = torch.cat([padded(x[i : i + 1], weight) for i in range(len(x))])
    for rows in (1, 2, 60, 128, 129, 300):
        assert torch.equal(padded(x[:rows], weight), alone[:rows])
        assert torch.equal(padded(x[-rows:], weight), alone[-rows:])


def test_the_product_sees_the_same_addresses_whatever_the_rows() -> None:
    x, weight = random(300, 64, dtype=torch.bfloat16), random(33, 64, seed=1, dtype=torch.bfloat16)
    workspace = torch.empty(ops.linear_workspace(33, 64), dtype=torch.uint8)
    seen = set()

    def product(padded: Tensor, weight: Tensor, out: Tensor) -> None:
        seen.add((padded.data_ptr(), padded.stride(), out.data_ptr(), out.stride()))
        row_by_row(padded, weight, out)

    for rows in (1, 60, 128, 300):
        # Strided rows, at other places, too.
        for part in (x[:rows], x[-rows:], random(rows, 128, dtype=torch.bfloat16)[:, :64]):
            out = torch.empty(rows, 33)
            linear_in_pieces(part, weight, None, None, out, workspace, product)
    assert len(seen) == 1
    padded_at = next(iter(seen))[0]
    assert (padded_at - workspace.data_ptr()) % 512 == 0


def test_what_other_rows_left_behind_is_not_seen() -> None:
    weight = random(33, 64, seed=1)
    workspace = torch.empty(ops.linear_workspace(33, 64), dtype=torch.uint8)
    workspace.view(torch.float32).fill_(float("nan"))
    out = torch.empty(3, 33)
    linear_in_pieces(random(3, 64), weight, None, None, out, workspace, row_by_row)
    assert torch.equal(out, ops.linear(random(3, 64), weight))


def test_a_workspace_that_is_too_small() -> None:
    x, weight = random(2, 64), random(33, 64)
    for short in (torch.empty(99, dtype=torch.uint8), torch.empty(1 << 20)):
        with pytest.raises(ValueError, match=r"workspace: expected at least \[49664\] uint8, got"):
            linear_in_pieces(x, weight, None, None, torch.empty(2, 33), short, row_by_row)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": random(2, 8)}, r"x, weight: expected \[M, K\] and \[N, K\], got \[2, 8\]"),
        ({"weight": random(9, 6).t()}, "weight: expected contiguous, got strides"),
        ({"weight": random(6, 9).bfloat16()}, r"weight: expected \[6, 9\] float32 on cpu, got"),
        ({"bias": random(5)}, r"bias: expected \[6\] float32 on cpu, got \[5\] float32"),
        ({"residual": random(2, 6).half()}, r"residual: .* got \[2, 6\] float16 on cpu"),
        ({"out": random(3, 6)}, r"out: expected \[2, 6\] float32 .* got \[3, 6\]"),
        ({"bias": random(6).to("meta")}, "bias: expected .* on cpu, got .* on meta"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], words: str) -> None:
    given: dict[str, Tensor | None] = {
        "x": random(2, 9),
        "weight": random(6, 9),
        "bias": None,
        "residual": random(2, 6),
        "out": random(2, 6),
    }
    check_gpu_linear(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        check_gpu_linear(**{**given, **change})  # type: ignore[arg-type]


def test_how_torch_is_asked_for_float32_results() -> None:
    """Its parser finds ``mm.dtype_out``, which only a GPU has, in every version that is allowed."""
    x, weight = (random(4, 8, dtype=torch.bfloat16) for _ in range(2))
    with pytest.raises(NotImplementedError, match=r"aten::mm\.dtype_out"):
        gpu_product(x, weight, torch.empty(4, 4))


# --- every row at every place ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda out, rows: None, (0, 0, 0)),
        (lambda out, rows: out[64:].add_(1e-3), (128, 0, 64)),
        (lambda out, rows: out.add_(1e-3 if rows < 16 else 0), (0, 15, 128)),
        (lambda out, rows: out[3, 0].neg_() if rows == 128 else None, (128, 1, 1)),
    ],
    ids=["none", "by place", "by number", "one bit"],
)
def test_rows_that_depend_on_others_are_found(
    spoil: Callable[[Tensor, int], object], expected: tuple[int, int, int]
) -> None:
    x, (weight,) = random_inputs(Shape("", "", 6, 16), torch.float32, "cpu")
    linear = Linear(weight)

    def product(x: Tensor) -> Tensor:
        out = linear(x)
        spoil(out, len(x))
        return out

    assert tuple(differing_rows(product, x).values()) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_places_numbers_and_company_on_a_gpu(shape: Shape, dtype: torch.dtype) -> None:
    x, (weight,) = random_inputs(shape, dtype, "cuda")
    linear = Linear(weight)
    assert not any(differing_rows(linear, x, linear.leave_behind).values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (4096, 14336), (33, 64)], ids=str)
def test_bits_on_a_gpu(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = random(*shape, seed=1, dtype=dtype).cuda()
    x = random(300, shape[1], dtype=dtype).cuda()
    alone = torch.cat([ops.linear(x[i : i + 1], weight) for i in range(len(x))])
    for rows in (1, 2, 60, 64, 65, 128, 129, 300):
        assert torch.equal(ops.linear(x[:rows], weight), alone[:rows]), rows
        assert torch.equal(ops.linear(x[-rows:], weight), alone[-rows:]), rows
    exact, usual = x.double() @ weight.double().T, x @ weight.T
    assert (alone - exact).abs().max() <= 2 * (usual - exact).abs().max()
    logits = torch.empty(len(x), len(weight), device="cuda")
    ops.linear(x, weight, out=logits)
    assert torch.equal(logits.to(dtype), alone)
