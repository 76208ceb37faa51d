"""``scale_add``: a factor, a cap and a residual, in float32, rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specrt import _C, ops
from tests.ops.conftest import Backend, OnAnotherGpu
from tests.ops.test_rms_norm import DTYPES, random, spread

Tensor = torch.Tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 37, 400, 2052])
@pytest.mark.parametrize("has_residual", [True, False])
def test_a_factor_is_one_product_and_one_sum(
    backend: Backend, has_residual: bool, width: int, dtype: torch.dtype
) -> None:
    """To the bit: the product is rounded to float32 before it is added."""
    x, residual = (random(5, width, seed=s, dtype=dtype).to(backend.device) for s in (0, 1))
    scaled = x.float() * torch.tensor(0.22, dtype=torch.float32)
    expected = (residual.float() + scaled if has_residual else scaled).to(dtype)
    out = ops.scale_add(
        x, 0.22, residual if has_residual else None, out=torch.full_like(x, float("nan"))
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_a_cap_is_a_tangent(backend: Backend, cap: float, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-300, 300, 3001), torch.linspace(-1, 1, 1001)]).to(dtype)[None]
    out = ops.scale_add(x.to(backend.device), 0.7, cap=cap).cpu()
    exact = cap * torch.tanh(0.7 * x.double() / cap)
    unit = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    smallest = torch.finfo(dtype).smallest_normal
    assert ((out - exact).abs() <= unit * exact.abs() + smallest).all()
    assert out.abs().max() <= cap
    if dtype == torch.float32:
        assert (out.sort().values == out[:, x[0].argsort()]).all()  # never turns an order round


@pytest.mark.parametrize("cap", [None, 30.0])
def test_extremes(backend: Backend, cap: float | None) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -0.0, inf, -inf, nan, 3e38, -3e38]]).repeat(1, 5)
    out = ops.scale_add(x.to(backend.device), 0.5, cap=cap).cpu().view(5, 7)
    most = inf if cap is None else cap
    large = 1.5e38 if cap is None else cap
    for row in out:
        assert row[:2].tolist() == [0, 0] and row[2:4].tolist() == [most, -most]
        assert row[4].isnan()
        assert row[5:].tolist() == pytest.approx([large, -large])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_bits_do_not_depend_on_backend_rows_isa_or_threads(
    backend: Backend, cap: float | None, dtype: torch.dtype
) -> None:
    x, residual = (4 * random(50, 411, seed=s, dtype=dtype) for s in (0, 1))
    expected = ops.scale_add(x, 0.3, residual, cap)
    there = ops.scale_add(x.to(backend.device), 0.3, residual.to(backend.device), cap)
    assert torch.equal(there.cpu(), expected)
    if backend.runs_cuda_source:
        return
    isa, threads = _C.active_isa(), torch.get_num_threads()
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 3, 8):
                torch.set_num_threads(count)
                assert torch.equal(ops.scale_add(x, 0.3, residual, cap), expected), (name, count)
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)
    for row in (0, 49):
        rows = slice(row, row + 1)
        assert torch.equal(ops.scale_add(x[rows], 0.3, residual[rows], cap), expected[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pad", [1, 8])
def test_in_place_and_nothing_around_is_touched(
    backend: Backend, pad: int, dtype: torch.dtype
) -> None:
    x, residual = (random(3, 250, seed=s, dtype=dtype).to(backend.device) for s in (0, 1))
    expected = ops.scale_add(x, 0.3, residual)
    for goes_to_x in (True, False):
        rooms, (first, second) = zip(*(spread(t, pad) for t in (x, residual)), strict=True)
        out = first if goes_to_x else second
        assert ops.scale_add(first, 0.3, second, out=out) is out
        assert torch.equal(out, expected)
        for room in rooms:
            assert int(room.isnan().sum()) == room.numel() - x.numel()


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_nothing_to_do(backend: Backend, shape: tuple[int, int]) -> None:
    assert ops.scale_add(torch.zeros(shape, device=backend.device), 2.0).shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16)}, r"x: expected \[M, H\] = .*, got \[16\]"),
        ({"residual": torch.zeros(3, 16)}, r"residual: expected \[M, H\] = \[2, 16\]"),
        ({"out": torch.zeros(2, 16).half()}, "out: expected float32 like x"),
        ({"cap": 0.0}, "cap: expected a positive number"),
        ({"cap": -1.0}, "cap: expected a positive number"),
    ],
)
def test_wrong_arguments_are_named(backend: Backend, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(2, 16), "factor": 1.0, **change}
    moved = {n: v.to(backend.device) if isinstance(v, Tensor) else v for n, v in given.items()}
    with pytest.raises(ValueError, match=message):
        ops.scale_add(**moved)


def test_tensors_on_two_devices_are_named() -> None:
    other: Any = OnAnotherGpu(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="^residual: expected a tensor on cpu as x is"):
        ops.scale_add(torch.zeros(2, 4), 1.0, other)


def test_compiles(device: torch.device) -> None:
    x, residual = random(3, 64, seed=2).to(device), random(3, 64, seed=3).to(device)
    compiled = torch.compile(ops.scale_add, fullgraph=True, backend="aot_eager")
    for cap in (None, 5.0):
        assert torch.equal(compiled(x, 0.4, residual, cap), ops.scale_add(x, 0.4, residual, cap))
