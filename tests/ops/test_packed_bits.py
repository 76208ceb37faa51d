"""Products by packed bfloat16: the bits of the definition, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from specrt import _C, ops
from specrt.ops import MatrixKind, PackedMatrix
from specrt.ops.matrix import layout_of
from tests.ops.conftest import load_simt
from tests.oracles import packed_bf16

KINDS = (MatrixKind.BF16_SPLIT, MatrixKind.BF16_ROUNDED)
ISAS = _C.build_info()["cpu_isas"]
MODEL = "model of tile registers"
ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 17, 33, 64, 65, 130)


@pytest.fixture(autouse=True)
def restore_settings() -> Iterator[None]:
    isa, threads = _C.active_isa(), torch.get_num_threads()
    yield
    _C.set_isa(isa)
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """A product whose x, residual and out have strided rows."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    residual: torch.Tensor

    @classmethod
    def of(cls, exponents: tuple[range, range], rows: int, outputs: int, depth: int) -> Case:
        """Numbers of all signs and mantissas; x and weights of exponents of their own."""
        rng = np.random.default_rng(outputs * depth)

        def numbers(of: range, *shape: int) -> torch.Tensor:
            bits = rng.integers(0, 1 << 23, shape) | rng.integers(0, 2, shape) << 31
            bits |= rng.integers(of.start, of.stop, shape) << 23
            is_tiny = rng.random(shape) < 0.03  # a denormal, or a zero
            bits = np.where(is_tiny, bits & 0x807FFFFF, bits).astype(np.uint32)
            return torch.from_numpy(bits.view(np.float32))

        x, w = exponents
        return cls(
            numbers(x, rows, depth + 3)[:, :depth],
            numbers(w, outputs, depth).bfloat16(),
            numbers(x, outputs),
            numbers(x, rows, outputs + 5)[:, :outputs],
        )

    def packed(self, kind: MatrixKind) -> PackedMatrix:
        matrix = PackedMatrix.empty(kind, *self.weight.shape)
        ops.matrix_pack(self.weight, matrix)
        return matrix

    def expected(self, kind: MatrixKind) -> torch.Tensor:
        given = self.x, self.weight.float(), self.bias, self.residual
        num_parts = 2 if kind == MatrixKind.BF16_SPLIT else 1
        return torch.from_numpy(
            packed_bf16.product(*(t.numpy() for t in given), num_parts=num_parts)
        )

    def product(self, isa: str, matrix: PackedMatrix, first: int, count: int) -> torch.Tensor:
        x, residual = self.x[first : first + count], self.residual[first : first + count]
        out = torch.full((count, len(self.bias) + 1), torch.nan)[:, :-1]
        scratch = ops.row_scratch(matrix.num_inputs, count).fill_(torch.nan)
        if isa == MODEL:
            layout, pieces = layout_of(matrix), 1 + count % 3
            values = matrix.values
            load_simt().tile_product(x, values, self.bias, residual, out, scratch, layout, pieces)
        else:
            _C.set_isa(isa)
            ops.linear(x, matrix, self.bias, residual, out, scratch)
        return out


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for NaN, of which any will do."""
    is_nan = expected.isnan()
    bits = (t.contiguous().view(torch.int32).where(~is_nan, 0) for t in (found, expected))
    return torch.equal(found.isnan(), is_nan) and torch.equal(*bits)


EXPONENTS = {
    "usual": (range(120, 130), range(118, 124)),
    "tiny products": (range(40, 90), range(38, 70)),
    "denormals": (range(60), range(180)),
    "overflow": (range(100, 255), range(100, 160)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponents", EXPONENTS.values(), ids=EXPONENTS)
def test_bits_of_the_definition(exponents: tuple[range, range], kind: MatrixKind) -> None:
    # A lone row is split in stretches of 2048.
    for shape in ((1, 1), (16, 32), (50, 300), (17, 2088)):
        case = Case.of(exponents, 9, *shape)
        matrix, expected = case.packed(kind), case.expected(kind)
        for isa in (*ISAS, MODEL):
            for count in (1, 9):
                assert same_bits(case.product(isa, matrix, 0, count), expected[:count]), isa


LEAST = 2.0**-126
BELOW = LEAST - 2.0**-149  # the largest denormal, which bfloat16 would round up to LEAST

EDGES = {
    # Products of even k: 2^-126, then little less. What is tiny is told at 24 bits of mantissa.
    "rounds up to a normal number": (((2.0**-63, 2.0**-63), (2.0**-76, -(2.0**-76))), LEAST),
    "stays below": (((2.0**-63, 2.0**-63), (1.5 * 2.0**-75, -(2.0**-76))), 0.0),
    "a denormal input": (((BELOW, 2.0**100),), 0.0),
    "a denormal weight": (((2.0**100, 2.0**-130),), 0.0),
    "a denormal rest of the input": (((LEAST * (1 + 2.0**-9), 2.0**100),), 2.0**-26),
}


@pytest.mark.parametrize(("products", "expected"), list(EDGES.values()), ids=EDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_where_denormals_begin(
    kind: MatrixKind, products: tuple[tuple[float, float], ...], expected: float
) -> None:
    x, weight = torch.zeros(2, 40), torch.zeros(3, 40)
    for i, (value, factor) in enumerate(products):
        x[:, 2 * i], weight[:, 2 * i] = value, factor
    nothing = torch.full((2, 3), BELOW)  # a denormal residual
    case = Case(x, weight.bfloat16(), torch.zeros(3), nothing)
    given = x.numpy(), weight.numpy(), None, nothing.numpy()
    num_parts = 2 if kind == MatrixKind.BF16_SPLIT else 1
    assert (packed_bf16.product(*given, num_parts=num_parts) == expected).all()
    for isa in (*ISAS, MODEL):
        for count in (1, 2):
            found = case.product(isa, case.packed(kind), 0, count)
            assert found.eq(expected).all(), (isa, count)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_its_bits_whatever_the_others_are(kind: MatrixKind) -> None:
    case = Case.of(EXPONENTS["usual"], 130, 37, 70)
    matrix, expected = case.packed(kind), case.expected(kind)
    for isa in (*ISAS, MODEL):
        for count in range(1, 131) if isa in ISAS[1:] else ROW_COUNTS:
            torch.set_num_threads(1 + count % 3)
            first = count % (131 - count)
            found = case.product(isa, matrix, first, count)
            assert same_bits(found, expected[first : first + count]), (isa, count)


@pytest.mark.parametrize(("kind", "most"), list(zip(KINDS, (1e-5, 5e-3), strict=True)))
def test_error_against_float64(kind: MatrixKind, most: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 2048, generator=generator)
    x[:, ::97] *= 20
    weight = torch.randn(48, 2048, generator=generator).bfloat16()
    matrix = PackedMatrix.empty(kind, 48, 2048)
    ops.matrix_pack(weight, matrix)
    exact = x.double() @ weight.double().T
    error = ops.linear(x, matrix).double() - exact
    assert error.norm() <= most * exact.norm()


def test_nothing_is_written_where_nobody_is_open() -> None:
    case = Case.of(EXPONENTS["usual"], 7, 37, 70)
    matrix = case.packed(MatrixKind.BF16_SPLIT)
    for isa in ISAS:
        _C.set_isa(isa)
        for rows in (1, 7):
            out = torch.full((rows, 37), torch.nan)
            closed = torch.zeros(2, dtype=torch.int32)
            ops.linear(case.x[:rows], matrix, out=out, is_open=closed)
            assert out.isnan().all()


def test_the_threads_modes_stay() -> None:
    """Arithmetic after a product still knows denormals."""
    case = Case.of(EXPONENTS["usual"], 7, 37, 70)
    for isa in ISAS:
        case.product(isa, case.packed(MatrixKind.BF16_SPLIT), 0, 7)
        assert (torch.full((1,), 2.0**-126) * 0.5).item() == 2.0**-127


def test_an_instruction_set_that_is_refused_is_told() -> None:
    facts = _C.build_info()
    assert facts["refused_isa"] is None or "amx" not in facts["cpu_isas"]
