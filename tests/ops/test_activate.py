"""``activate``: each activation right to rounding over its whole range, gated or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from specrt import _C, ops
from tests.ops.conftest import Backend, OnAnotherGpu

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TORCHS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
# Units of the last place of the result, in float32; in 16 bits rounding is all there is.
ULPS = {"silu": 4, "gelu": 6, "gelu_tanh": 24, "relu": 0, "relu2": 1}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Beside whole blocks of threads: tails of a vector, of a block, and widths where `up` is unaligned.
# How a row is cut up is one for all activations.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize(
    ("name", "width"),
    [*(("silu", width) for width in (1, 37, 400)), *((name, 2052) for name in TORCHS)],
)
def test_error_within_twice_torchs(
    backend: Backend, name: str, is_gated: bool, width: int, dtype: torch.dtype
) -> None:
    columns = 2 * width if is_gated else width
    x = 4 * random(5, columns + 3, dtype=dtype).to(backend.device)
    x = x[:, :columns]  # strided rows
    out = ops.activate(x, x.new_full((5, width), float("nan")), name, is_gated)
    gate, up = x.chunk(2, 1) if is_gated else (x, torch.ones_like(x))
    exact = TORCHS[name](gate.double()) * up.double()
    theirs = (TORCHS[name](gate) * up - exact).abs().max()
    assert (out - exact).abs().max() <= 2 * theirs + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TORCHS)
def test_relative_error_over_the_whole_range(
    backend: Backend, name: str, dtype: torch.dtype
) -> None:
    x = torch.linspace(-80, 80, 4001, dtype=dtype, device=backend.device)
    out = ops.activate(x[None], activation=name, is_gated=False)[0]
    gated = ops.activate(torch.cat([x, torch.ones_like(x)])[None], activation=name)[0]
    assert torch.equal(out, gated)
    wide = x.double()
    # torch's own gelu is 1 + erf, which has no digits left where erf is near -1.
    tail = torch.special.erfc(-wide / 2**0.5) / 2
    exact = wide * tail if name == "gelu" else TORCHS[name](wide)
    if name == "gelu_tanh":
        inner = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
        exact = wide * torch.sigmoid(2 * inner)
    unit = {
        torch.float32: 2**-24 * max(1, ULPS[name]),
        torch.bfloat16: 2**-8,
        torch.float16: 2**-11,
    }
    smallest = 4 * torch.finfo(dtype).smallest_normal  # near there numbers lose digits
    is_finite = exact.abs() <= torch.finfo(dtype).max
    error = (out - exact).abs()
    # An argument's own rounding, at most half a unit of x^2 / 2, shows in exp(-x^2 / 2).
    slack = 1 + wide.square() if name.startswith("gelu") and dtype == torch.float32 else 1
    assert (error <= unit[dtype] * exact.abs() * slack + smallest)[is_finite].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TORCHS)
def test_extremes(backend: Backend, name: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([100.0, -100.0, 0.0, inf, nan], dtype=dtype).repeat(8)[:37]
    row = torch.cat([gate, torch.ones_like(gate)])[None].to(backend.device)
    most = 10000 if name == "relu2" else 100
    for is_gated, x in ((True, row), (False, row[:, :37])):
        for out in ops.activate(x, None, name, is_gated)[0, :35].view(7, 5):  # and in the tail
            assert abs(float(out[0]) / most - 1) < 0.01 and abs(float(out[1])) < 1e-30
            assert out[2] == 0 and out[3] == inf and out[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TORCHS)
def test_bits_do_not_depend_on_rows_isa_or_threads(name: str, dtype: torch.dtype) -> None:
    x = random(50, 2 * 411, seed=1, dtype=dtype)
    x[1, :411], x[1, 411:] = torch.linspace(-25, 0, 411), 1  # down to subnormals of float16
    x[2] = 1000  # and past its largest number
    isa, threads = _C.active_isa(), torch.get_num_threads()
    for is_gated in (True, False):
        expected = ops.activate(x, None, name, is_gated)
        try:
            for set_name in _C.build_info()["cpu_isas"]:
                _C.set_isa(set_name)
                for count in (1, 3, 8):
                    torch.set_num_threads(count)
                    out = ops.activate(x, None, name, is_gated)
                    assert torch.equal(out, expected), (set_name, count)
        finally:
            _C.set_isa(isa)
            torch.set_num_threads(threads)
        for row in (0, 7, 49):
            one = ops.activate(x[row : row + 1], None, name, is_gated)
            assert torch.equal(one, expected[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu", "relu2"])
def test_a_gpu_gives_a_hosts_bits(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """All but silu's, which takes CUDA's own exponential there."""
    x = torch.cat([torch.linspace(-30, 30, 3000), random(1000, seed=3)]).to(dtype)[None]
    for is_gated in (True, False):
        expected = ops.activate(x, None, name, is_gated)
        out = ops.activate(x.to(backend.device), None, name, is_gated)
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 411])
@pytest.mark.parametrize("is_gated", [True, False])
def test_bits_do_not_depend_on_rows_or_strides_and_nothing_around_is_touched(
    backend: Backend, is_gated: bool, width: int, dtype: torch.dtype
) -> None:
    columns = 2 * width if is_gated else width
    x = random(9, columns, seed=1, dtype=dtype).to(backend.device)
    expected = ops.activate(x, None, "silu", is_gated)
    for row in (0, 7):
        one = ops.activate(x[row : row + 1], None, "silu", is_gated)
        assert torch.equal(one, expected[row : row + 1])
    for pad in (1, 8):
        wide = x.new_full((9, pad + columns + pad), float("nan"))
        wide[:, pad:-pad] = x
        room = x.new_full((9, pad + width + pad), float("nan"))
        ops.activate(wide[:, pad:-pad], room[:, pad:-pad], "silu", is_gated)
        assert torch.equal(room[:, pad:-pad], expected)
        assert room[:, :pad].isnan().all() and room[:, -pad:].isnan().all()


def test_in_place(backend: Backend) -> None:
    x = random(3, 128, seed=4).to(backend.device)
    expected = ops.activate(x), ops.activate(x, None, "gelu", False)
    gated, plain = x.clone(), x.clone()
    ops.activate(gated, gated[:, :64])
    ops.activate(plain, plain, "gelu", False)
    assert torch.equal(gated[:, :64], expected[0]) and torch.equal(gated[:, 64:], x[:, 64:])
    assert torch.equal(plain, expected[1])


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_nothing_to_do(backend: Backend, shape: tuple[int, int]) -> None:
    x = torch.zeros(shape, device=backend.device)
    assert ops.activate(x).shape == (shape[0], shape[1] // 2)
    assert ops.activate(x, None, "relu", False).shape == shape


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 1), "^x: expected an even"),
        (torch.zeros(2, 4).double(), torch.zeros(2, 2), "^x: expected float32, bfloat16 or"),
        (torch.zeros(2, 4), torch.zeros(2, 3), r"^out: expected \[M, I\] = \[2, 2\] float32"),
        (torch.zeros(2, 4).half(), torch.zeros(2, 2), "^out: expected float16 like x, got"),
    ],
)
def test_a_wrong_argument_is_named(backend: Backend, x: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.activate(x.to(backend.device), out.to(backend.device))


def test_an_unknown_activation_is_named(backend: Backend) -> None:
    with pytest.raises(ValueError, match="^activation: expected silu, gelu, .* got tanh"):
        ops.activate(torch.zeros(2, 4, device=backend.device), activation="tanh")


@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 4)])
def test_a_wrong_shape_is_named_without_out(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="^x: "):
        ops.activate(torch.zeros(shape))


def test_tensors_on_two_devices_are_named() -> None:
    out: Any = OnAnotherGpu(torch.zeros(2, 2))
    message = "^out: expected a tensor on cpu as x is, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        ops.activate(torch.zeros(2, 4), out)


def test_compiles(device: torch.device) -> None:
    x = random(3, 64, seed=2).to(device)
    compiled = torch.compile(
        lambda x: ops.activate(x) + ops.activate(x, None, "gelu", False)[:, :32],
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x), ops.activate(x) + ops.activate(x, None, "gelu", False)[:, :32])
