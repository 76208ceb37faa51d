"""``linear`` on a GPU with rows out of tables, with a second half of K, and with a gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specrt import ops
from tests.linear_stand_in import taken
from tests.ops.conftest import Backend, load_simt
from tests.ops.test_feature_sample import Weights, by_torch, inputs
from tests.ops.test_feature_sample_16_bits import there
from tests.ops.test_linear_bits import NAN, made, run, spread

SIMT_SCHEDULES = (1, 2)
Tensor = torch.Tensor
BEGINS = {(72, 104): 40, (33, 200): 64, (8, 1032): 520}
"""Of matrices, without slices of K and with them, where the second operand's columns begin."""
SIZES = [pytest.param(shape, rows, id=f"{shape}-{rows}") for shape in BEGINS for rows in (1, 20)]


@pytest.fixture(autouse=True)
def on_a_gpu(backend: Backend) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("of the CUDA source")


def gathered(table: Tensor, num_rows: int, seed: int) -> ops.GatheredRows:
    """Of any rows, of which some are there more than once, and some are past the table's ends."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-2, len(table) + 2, (num_rows,), generator=generator).int()
    rows[-1] = (2**31 - 1, -(2**31))[seed % 2]
    return ops.GatheredRows(table, rows.to(table.device))


class Operands:
    """All that a product may take, out of tables."""

    def __init__(self, backend: Backend, shape: tuple[int, int], rows: int) -> None:
        x, self.weight = made(shape, 11, backend)
        begin, num_outputs = BEGINS[shape], shape[0]
        self.x = gathered(x[:, :begin].contiguous(), rows, 0)
        self.second = gathered(x[:7, begin:].contiguous(), rows, 1)
        self.gate = gathered(spread(5, num_outputs, x.dtype, backend, seed=2), rows, 2)
        self.residual = gathered(spread(6, num_outputs, x.dtype, backend, seed=3), rows, 3)
        self.bias = spread(1, num_outputs, x.dtype, backend, seed=4)[0].float()

    def run(self, only: slice = slice(None), **rest: Any) -> Tensor:
        """Of some of the rows."""
        names = "x", "second", "gate", "residual"
        rows = {n: ops.GatheredRows(t.table, t.rows[only]) for n in names for t in [vars(self)[n]]}
        return self.product(**rows, **rest)

    def by_torch(self) -> Tensor:
        """Gathered beforehand; the gate alone cannot be left out."""
        x = torch.cat([taken(self.x), taken(self.second)], -1)
        return self.product(x, gate=taken(self.gate), residual=taken(self.residual))

    def product(self, x: ops.GatheredRows | Tensor, **rest: Any) -> Tensor:
        rows = x.rows if isinstance(x, ops.GatheredRows) else x
        out = torch.full((len(rows), len(self.weight)), NAN, device=self.weight.device)
        size = ops.linear_workspace(*self.weight.shape, len(rows))
        workspace = torch.zeros(size, device=out.device)
        ops.linear(x, self.weight, self.bias, out=out, workspace=workspace, **rest)
        assert not workspace[:512].view(torch.int32).any(), "tickets"
        return out


@pytest.mark.parametrize(("shape", "rows"), SIZES)
def test_rows_of_tables_are_those_rows(backend: Backend, shape: tuple[int, int], rows: int) -> None:
    operands = Operands(backend, shape, rows)
    assert torch.equal(operands.run(), operands.by_torch())


@pytest.mark.parametrize("shape", BEGINS, ids=str)
def test_the_order_of_steps(backend: Backend, shape: tuple[int, int]) -> None:
    """Sum, bias, gate, residual, each rounded once; silu(x) is x from 32 on."""
    x, weight = made(shape, 9, backend)
    bias = spread(1, shape[0], x.dtype, backend, seed=4)[0].float()
    gate = spread(9, shape[0], x.dtype, backend, seed=2).abs() + 32
    residual = spread(9, shape[0], x.dtype, backend, seed=3)
    expected = run(x, weight, bias=bias) * gate.float() + residual.float()
    assert torch.equal(run(x, weight, bias=bias, gate=gate, residual=residual), expected)
    out = ops.linear(x, weight, bias, residual, gate=gate)
    assert torch.equal(out, expected.to(x.dtype))


def test_a_gate_is_silu(backend: Backend) -> None:
    x, weight = made((72, 104), 9, backend)
    gate = torch.linspace(-30, 30, 9 * 72).view(9, 72).to(x)
    exact = torch.nn.functional.silu(gate.double()) * run(x, weight)
    found = run(x, weight, gate=gate).double()
    assert torch.allclose(found, exact, rtol=1e-6, atol=0)


@pytest.mark.tensor_cores("sm_80", "sm_90")
def test_bits_depend_on_the_row_alone(backend: Backend) -> None:
    for shape in ((72, 104), (8, 1032)):
        operands = Operands(backend, shape, 70)
        whole = operands.run()
        for only in (slice(0, 1), slice(61, 70), slice(1, 34)):
            assert torch.equal(operands.run(only), whole[only]), only


def test_every_plan_gives_the_same_bits(backend: Backend) -> None:
    for shape, rows in (((72, 104), 9), ((8, 1032), 40), ((72, 104), 129)):
        operands = Operands(backend, shape, rows)
        expected = operands.run()
        for plan in (ops.LinearPlan(64, 2), ops.LinearPlan(128, 3)):
            assert torch.equal(operands.run(plan=plan), expected), plan


def test_more_rows_than_a_launch_takes(backend: Backend) -> None:
    """Indices go on with the rows."""
    if backend.name != "simt":
        pytest.skip("launches are counted by the shim")
    operands = Operands(backend, (8, 1032), 258)
    before = load_simt().num_launches()
    whole = operands.run()
    assert load_simt().num_launches() - before == 2
    assert torch.equal(operands.run(slice(256, None)), whole[256:])


def test_rows_of_wider_tables(backend: Backend) -> None:
    """Gates and residuals at any place; what lies beside is not seen."""
    operands = Operands(backend, (72, 104), 9)
    expected = operands.run()
    for name, offset in (("x", 8), ("second", 16), ("gate", 8), ("gate", 3), ("residual", 1)):
        wider = Operands(backend, (72, 104), 9)
        table, rows = vars(wider)[name]
        wide = torch.nn.functional.pad(table, (offset, 24 - offset), value=NAN)
        inner = wide[:, offset : offset + table.shape[1]]
        setattr(wider, name, ops.GatheredRows(inner, rows))
        assert torch.equal(wider.run(), expected), name


@pytest.mark.parametrize("is_folded", [False, True])
def test_feature_sampling_by_the_kernels_themselves(backend: Backend, is_folded: bool) -> None:
    """In the other tests of it products stand in."""
    plain = Weights.random(64, 48, torch.bfloat16)
    weights = there(plain.folded(is_folded, is_folded), torch.bfloat16, backend)
    tokens, features = inputs(9, 64)
    source = torch.arange(9).flip(0).int()
    given = [t.to(backend.device) for t in (tokens, source, features.bfloat16())]
    out = weights.run(*given).cpu()
    picked = features.bfloat16()[source.long()]
    exact = by_torch(plain, tokens, picked, torch.float64)
    usual = by_torch(plain, tokens, picked, torch.bfloat16)
    ours, theirs = ((result.double() - exact).square().mean() for result in (out, usual))
    assert 0 < ours <= 4 * theirs  # of roots: twice


def test_no_rows(backend: Backend) -> None:
    operands = Operands(backend, (72, 104), 9)
    assert operands.run(slice(0, 0)).shape == (0, 72)


ROWS = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ops.GatheredRows(torch.zeros(0, 8).half(), ROWS)}, "x: expected at least one row"),
        ({"x": ops.GatheredRows(torch.zeros(3, 8).half(), ROWS.long())}, r"x_rows: expected \[M\]"),
        ({"x": torch.zeros(2, 16).half()}, "x: expected a multiple of 8 values .* fewer than K"),
        ({"x": torch.zeros(2, 4).half()}, "x: expected a multiple of 8 values a row, fewer than K"),
        ({"second": torch.zeros(2, 16).half()}, r"second: expected \[M, K - K'\] = \[\*, 8\]"),
        ({"second": torch.zeros(3, 8).half()}, r"second: expected \[M, K - K'\] = \[2, 8\]"),
        ({"second": torch.zeros(2, 12).half()[:, :8]}, "second: expected rows at multiples of 16"),
        ({"gate": torch.zeros(2, 8)}, r"gate: expected \[M, N\] = \[2, 16\] float16"),
        ({"gate": torch.zeros(3, 16).half()}, r"gate: expected \[M, N\] = \[2, 16\] float16"),
        (
            {"residual": ops.GatheredRows(torch.zeros(3, 16).half(), ROWS[:1])},
            r"residual_rows: expected \[M\] = \[2\] int32",
        ),
        ({"is_gated": True}, "gate: expected None with is_gated or maxima"),
    ],
)
def test_wrong_operands_are_named(backend: Backend, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(2, 8).half(),
        "second": torch.zeros(2, 8).half(),
        "weight": torch.zeros(16, 16).half(),
        "gate": torch.zeros(2, 16).half(),
        **change,
    }

    def on_device(value: Any) -> Any:
        if isinstance(value, ops.GatheredRows):
            return ops.GatheredRows(*(backend.hold(t) for t in value))
        return backend.hold(value) if isinstance(value, Tensor) else value

    with pytest.raises(ValueError, match=message):
        ops.linear(**{name: on_device(value) for name, value in given.items()})
