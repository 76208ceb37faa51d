"""``linear`` on a GPU, with cuBLAS for an oracle; what looks at rows' bits, on any device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.linear_rows import SHAPES, Shape, random_inputs
from specrt import ops
from specrt.models.row_check import Linear, differing_rows

DTYPES = [torch.bfloat16, torch.float16]
Tensor = torch.Tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_places_and_numbers_on_a_gpu(shape: Shape, dtype: torch.dtype) -> None:
    x, (weight,) = random_inputs(shape, dtype, "cuda")
    assert not any(differing_rows(Linear(weight), x).values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (4096, 14336), (33, 64)], ids=str)
def test_no_less_exact_than_cublas(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """And as many rows as there are give the bits of each alone."""
    weight = random(*shape, seed=1, dtype=dtype).cuda()
    x = random(300, shape[1], dtype=dtype).cuda()
    alone = torch.cat([ops.linear(x[i : i + 1], weight) for i in range(len(x))])
    for rows in (1, 2, 60, 64, 65, 128, 129, 300):
        assert torch.equal(ops.linear(x[:rows], weight), alone[:rows]), rows
        assert torch.equal(ops.linear(x[-rows:], weight), alone[-rows:]), rows
    exact, cublas = x.double() @ weight.double().T, x @ weight.T
    assert (alone - exact).abs().max() <= 2 * (cublas - exact).abs().max()
    logits = torch.empty(len(x), len(weight), device="cuda")
    ops.linear(x, weight, out=logits)
    assert torch.equal(logits.to(dtype), alone)
