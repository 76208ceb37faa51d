"""``layer_norm``: right to rounding, with a bias or without, each row's bits its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from specrt import _C, ops
from tests.ops.conftest import Backend, OnAnotherGpu
from tests.ops.test_rms_norm import DTYPES, EPS, HALF, random, spread

Tensor = torch.Tensor
SIMT_SCHEDULES = (1, 0, 2)
WIDTHS = [1, 15, 64, 100, 256, 1000, 4096, 8192]


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide, other = x.double(), None if bias is None else bias.double()
    return functional.layer_norm(wide, wide.shape[-1:], weight.double(), other, EPS)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_as_exact_as_torch(
    backend: Backend, width: int, dtype: torch.dtype, has_bias: bool
) -> None:
    x = (3 * random(5, width) + 2).to(dtype).to(backend.device)  # of a mean that is no zero
    weight, bias = (random(width, seed=s).to(dtype).to(backend.device) for s in (1, 2))
    given = bias if has_bias else None
    exact = oracle(x, weight, given)
    usual = functional.layer_norm(x, (width,), weight, given, EPS)
    out = ops.layer_norm(
        x, weight.float(), bias.float() if has_bias else None, EPS, torch.full_like(x, float("nan"))
    )
    unit = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    error = (out - exact).abs()
    assert error.max() <= 2 * (usual - exact).abs().max() + unit * exact.abs().max() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_costs_no_digits(backend: Backend, dtype: torch.dtype) -> None:
    """The mean goes first: a mean of squares less the square of the mean would have none left."""
    x = (1024 + torch.randint(0, 3, (4, 512), generator=torch.Generator().manual_seed(0)) * 8.0).to(
        dtype
    )
    weight = torch.ones(512)
    out = ops.layer_norm(x.to(backend.device), weight.to(backend.device), None, EPS)
    exact = oracle(x, weight, None)
    unit = {torch.float32: 2**-18, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((out.cpu() - exact).abs() <= unit * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("width", [16389, 20000])
def test_rows_longer_than_registers(backend: Backend, width: int) -> None:
    x, residual = (random(2, width, seed=s).to(backend.device) for s in (0, 1))
    weight, bias = (random(width, seed=s).to(backend.device) for s in (2, 3))
    total = residual + x
    exact = oracle(total, weight, bias)
    out = ops.layer_norm(x, weight, bias, EPS, residual=residual)
    assert torch.equal(residual, total)
    assert ((out - exact).abs() <= 2**-19 * (1 + exact.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 250, 3000])
def test_residual_is_added_first_and_kept(backend: Backend, width: int, dtype: torch.dtype) -> None:
    x, residual = (random(5, width, seed=s, dtype=dtype).to(backend.device) for s in (0, 1))
    weight, bias = (random(width, seed=s).to(backend.device) for s in (2, 3))
    total = residual + x
    out = ops.layer_norm(x, weight, bias, EPS, residual=residual)
    assert torch.equal(residual, total)
    assert torch.equal(out, ops.layer_norm(total, weight, bias, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 256, 1000, 2048])
def test_bits_depend_on_the_row_alone(backend: Backend, width: int, dtype: torch.dtype) -> None:
    rows = 100 if backend.name != "simt" else 30
    x = random(rows, width, dtype=dtype).to(backend.device)
    weight, bias = (random(width, seed=s).to(backend.device) for s in (1, 2))
    alone = torch.cat([ops.layer_norm(x[i : i + 1], weight, bias, EPS) for i in range(rows)])
    for count in (1, 2, 23, rows):
        assert torch.equal(ops.layer_norm(x[:count], weight, bias, EPS), alone[:count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [250, 1000])
def test_bits_do_not_depend_on_isa_or_threads(width: int, dtype: torch.dtype) -> None:
    x = random(60, width, dtype=dtype)
    weight, bias = random(width, seed=2), random(width, seed=3)
    isa, threads = _C.active_isa(), torch.get_num_threads()
    expected = ops.layer_norm(x, weight, bias, EPS)
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 2, 8):
                torch.set_num_threads(count)
                out = ops.layer_norm(x, weight, bias, EPS)
                assert torch.equal(out, expected), (name, count)
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 250, 8200])
@pytest.mark.parametrize("pad", [1, 8])
def test_nothing_around_rows_is_touched(
    backend: Backend, width: int, pad: int, dtype: torch.dtype
) -> None:
    x = random(3, width, dtype=dtype).to(backend.device)
    weight, bias = (random(width, seed=s).to(backend.device) for s in (1, 2))
    expected = ops.layer_norm(x, weight, bias, EPS)
    (room, view), (_, given) = spread(x, pad), spread(x, pad)
    ops.layer_norm(given, weight, bias, EPS, view)
    assert torch.equal(view, expected)
    assert int(room.isnan().sum()) == room.numel() - x.numel()
    ops.layer_norm(given, weight, bias, EPS, given)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)])
def test_nothing_to_do(backend: Backend, shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(shape), torch.zeros(shape[-1])
    x, weight = x.to(backend.device), weight.to(backend.device)
    assert ops.layer_norm(x, weight, weight, EPS).shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16)}, r"x: expected \[M, H\] or \[M, S, H\], got \[16\]"),
        ({"weight": torch.zeros(15)}, r"weight: expected \[H\] = \[16\]"),
        ({"bias": torch.zeros(15)}, r"bias: expected \[H\] = \[16\]"),
        ({"bias": HALF[0]}, r"bias: expected \[H\] = \[16\] float32, got \[16\] bfloat16"),
        ({"residual": torch.zeros(3, 16)}, r"residual: expected \[M, H\] = \[2, 16\]"),
        ({"out": HALF}, r"out: expected float32 like x, got \[2, 16\] bfloat16"),
    ],
)
def test_wrong_arguments_are_named(
    backend: Backend, change: dict[str, Tensor], message: str
) -> None:
    rows, row = torch.zeros(2, 16), torch.zeros(16)
    tensors = {"x": rows, "weight": row, "bias": row, "out": rows.clone()}
    moved = {name: value.to(backend.device) for name, value in (tensors | change).items()}
    with pytest.raises(ValueError, match=message):
        ops.layer_norm(**moved, eps=EPS)


@pytest.mark.parametrize("name", ["weight", "bias", "out"])
def test_tensors_on_two_devices_are_named(name: str) -> None:
    tensors: dict[str, Any] = {"x": torch.zeros(2, 16), "out": torch.zeros(2, 16)}
    tensors |= {"weight": torch.zeros(16), "bias": torch.zeros(16)}
    tensors[name] = OnAnotherGpu(tensors[name])
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor on cpu as x is"):
        ops.layer_norm(**tensors, eps=EPS)


def test_under_torch_compile(device: torch.device) -> None:
    x, weight, bias = (
        t.to(device) for t in (random(3, 16), random(16, seed=1), random(16, seed=2))
    )
    compiled = torch.compile(ops.layer_norm, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, bias, EPS), ops.layer_norm(x, weight, bias, EPS))
