from __future__ import annotations

from typing import Any

import pytest
import torch

from specrt import _C, ops
from tests.ops.conftest import Backend, OnAnotherGpu

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Beside whole blocks of threads: tails of a vector, of a block, and widths where `up` is unaligned.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 37, 400, 2052])
@pytest.mark.parametrize("rows", [1, 5])
def test_error_within_twice_torchs(
    backend: Backend, rows: int, width: int, dtype: torch.dtype
) -> None:
    x = 4 * random(rows, 2 * width + 3, dtype=dtype).to(backend.device)
    x = x[:, : 2 * width]  # strided rows
    out = ops.silu_mul(x, x.new_full((rows, width), float("nan")))
    gate, up = x.chunk(2, 1)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    theirs = (torch.nn.functional.silu(gate) * up - exact).abs().max()
    assert (out - exact).abs().max() <= 2 * theirs + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_relative_error_over_the_whole_range(backend: Backend, dtype: torch.dtype) -> None:
    gate = torch.linspace(-80, 80, 4000, dtype=dtype, device=backend.device)
    out = ops.silu_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    exact = torch.nn.functional.silu(gate.double())
    unit = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    smallest = torch.finfo(dtype).smallest_normal * unit  # below, numbers lose digits
    assert ((out - exact).abs() <= unit * exact.abs() + smallest).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(backend: Backend, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([100.0, -100.0, 0.0, inf, nan], dtype=dtype).repeat(8)[:37]
    row = torch.cat([gate, torch.ones_like(gate)])[None].to(backend.device)
    for out in ops.silu_mul(row)[0, :35].view(7, 5):  # in vectors, and in the tail
        assert out[0] == 100 and abs(float(out[1])) < 1e-30 and out[2] == 0
        assert out[3] == inf and out[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_rows_isa_or_threads(dtype: torch.dtype) -> None:
    x = random(50, 2 * 411, seed=1, dtype=dtype)
    x[1, :411], x[1, 411:] = torch.linspace(-25, 0, 411), 1  # down to subnormals of float16
    x[2] = 1000  # and past its largest number
    expected = ops.silu_mul(x)
    isa, threads = _C.active_isa(), torch.get_num_threads()
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                assert torch.equal(ops.silu_mul(x), expected), (name, count)
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)
    for row in (0, 7, 49):
        assert torch.equal(ops.silu_mul(x[row : row + 1]), expected[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 411])
def test_bits_do_not_depend_on_rows_or_strides_and_nothing_around_is_touched(
    backend: Backend, width: int, dtype: torch.dtype
) -> None:
    x = random(9, 2 * width, seed=1, dtype=dtype).to(backend.device)
    expected = ops.silu_mul(x)
    for row in (0, 7):
        assert torch.equal(ops.silu_mul(x[row : row + 1]), expected[row : row + 1])
    for pad in (1, 8):
        wide = x.new_full((9, pad + 2 * width + pad), float("nan"))
        wide[:, pad:-pad] = x
        room = x.new_full((9, pad + width + pad), float("nan"))
        ops.silu_mul(wide[:, pad:-pad], room[:, pad:-pad])
        assert torch.equal(room[:, pad:-pad], expected)
        assert room[:, :pad].isnan().all() and room[:, -pad:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_nothing_to_do(backend: Backend, shape: tuple[int, int]) -> None:
    out = ops.silu_mul(torch.zeros(shape, device=backend.device))
    assert out.shape == (shape[0], shape[1] // 2)


@pytest.mark.parametrize(
    ("gate_up", "out", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 1), "^gate_up: expected an even"),
        (torch.zeros(2, 4).double(), torch.zeros(2, 2), "^gate_up: expected float32, bfloat16 or"),
        (torch.zeros(2, 4), torch.zeros(2, 3), r"^out: expected \[M, I\] = \[2, 2\] float32"),
        (torch.zeros(2, 4).half(), torch.zeros(2, 2), "^out: expected float16 like gate_up, got"),
    ],
)
def test_a_wrong_argument_is_named(
    backend: Backend, gate_up: Tensor, out: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ops.silu_mul(gate_up.to(backend.device), out.to(backend.device))


@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 4)])
def test_a_wrong_shape_is_named_without_out(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="^gate_up: "):
        ops.silu_mul(torch.zeros(shape))


def test_tensors_on_two_devices_are_named() -> None:
    out: Any = OnAnotherGpu(torch.zeros(2, 2))
    message = "^out: expected a tensor on cpu as gate_up is, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        ops.silu_mul(torch.zeros(2, 4), out)


def test_compiles(device: torch.device) -> None:
    x = random(3, 64, seed=2).to(device)
    compiled = torch.compile(ops.silu_mul, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.silu_mul(x))
