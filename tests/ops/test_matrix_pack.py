"""Packed matrices: rows in and out, and products by them."""

from __future__ import annotations

import pytest
import torch

from specrt import ops
from specrt.ops import MatrixKind, PackedMatrix

BF16 = (MatrixKind.BF16_SPLIT, MatrixKind.BF16_ROUNDED)


def packed(kind: MatrixKind, weight: torch.Tensor) -> PackedMatrix:
    matrix = PackedMatrix.empty(kind, *weight.shape)
    for start in range(0, len(weight), 7):
        assert ops.matrix_pack(weight[start : start + 7], matrix, start)
    return matrix


@pytest.mark.parametrize("shape", [(16, 32), (70, 100), (3, 5), (33, 31)])
@pytest.mark.parametrize("kind", BF16)
def test_rows_come_back_as_bfloat16(kind: MatrixKind, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    tokens = torch.arange(len(weight) - 1, -1, -1, dtype=torch.int32)
    assert torch.equal(ops.embed(tokens, packed(kind, weight)), weight.bfloat16().float().flip(0))


@pytest.mark.parametrize(("kind", "most"), zip(BF16, (2e-5, 5e-3), strict=True))
def test_product_is_near_float64(kind: MatrixKind, most: float) -> None:
    weight, x, bias = torch.randn(70, 100), torch.randn(5, 100), torch.randn(70)
    residual = torch.randn(5, 70)
    exact = x.double() @ weight.bfloat16().double().T
    found = ops.linear(x, packed(kind, weight), bias, residual) - bias - residual
    assert (found - exact).norm() <= most * exact.norm()


def test_values_that_are_not_finite_are_told() -> None:
    weight = torch.randn(4, 9)
    weight[2, 8] = torch.inf
    matrix = PackedMatrix.empty(MatrixKind.BF16_SPLIT, 4, 9)
    assert ops.matrix_pack(weight[:2], matrix)
    assert not ops.matrix_pack(weight[2:], matrix, 2)


def test_what_does_not_fit_is_named() -> None:
    matrix = packed(MatrixKind.BF16_SPLIT, torch.randn(20, 40))
    with pytest.raises(ValueError, match=r"^first_row: expected rows within \[0, 20\), got 19"):
        ops.matrix_pack(torch.randn(2, 40), matrix, 19)
    with pytest.raises(ValueError, match=r"^source: expected \[R, K\]"):
        ops.matrix_pack(torch.randn(2, 41), matrix)
    with pytest.raises(ValueError, match=r"^x: expected \[M, K\]"):
        ops.linear(torch.randn(2, 41), matrix)
    with pytest.raises(ValueError, match="^workspace: expected at least"):
        ops.linear(torch.randn(2, 40), matrix, workspace=torch.empty(8))
