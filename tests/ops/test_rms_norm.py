"""``rms_norm``: right to rounding, fused residual, heads, each row's bits its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specrt import _C, ops
from tests.ops.conftest import Backend, OnAnotherGpu

Tensor = torch.Tensor
EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIMT_SCHEDULES = (1, 0, 2)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def spread(x: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Memory full of NaN, and in it a copy of ``x``: ``pad`` elements before and after each row."""
    rows, width = x.shape
    room = x.new_full((pad + rows * (width + pad),), float("nan"))
    view = room[pad:].view(rows, width + pad)[:, :width]
    view.copy_(x)
    return room, view


# Every way a row can be shared out: lanes of a warp, a block's registers, and more than those hold.
WIDTHS = [1, 15, 64, 100, 128, 250, 256, 512, 1000, 4096, 5120, 8192]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_as_exact_as_torch(backend: Backend, width: int, dtype: torch.dtype) -> None:
    x = 3 * random(5, width, dtype=dtype).to(backend.device)
    weight = random(width, seed=1, dtype=dtype).to(backend.device)
    exact = oracle(x, weight)
    usual = torch.nn.functional.rms_norm(x, (width,), weight, EPS)
    out = ops.rms_norm(x, weight.float(), EPS, out=torch.full_like(x, float("nan")))
    assert (out - exact).abs().max() <= 2 * (usual - exact).abs().max() + 1e-6


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(16392, torch.bfloat16), (20000, torch.float32), (16389, torch.float16)],
)
def test_rows_longer_than_registers(backend: Backend, width: int, dtype: torch.dtype) -> None:
    x, residual = (random(2, width, seed=s, dtype=dtype).to(backend.device) for s in (0, 1))
    weight = random(width, seed=2).to(backend.device)
    total = residual + x
    exact = oracle(total, weight)
    out = ops.rms_norm(x, weight, EPS, residual, out=torch.full_like(x, float("nan")))
    assert torch.equal(residual, total)
    # An output is rounded once, to a unit of its own size; the sum's own error is far below.
    unit = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((out - exact).abs() <= unit * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 250, 3000])
def test_residual_is_added_first_and_kept(backend: Backend, width: int, dtype: torch.dtype) -> None:
    x, residual = (random(5, width, seed=s, dtype=dtype).to(backend.device) for s in (0, 1))
    weight = random(width, seed=2).to(backend.device)
    total, before = residual + x, x.clone()
    out = ops.rms_norm(x, weight, EPS, residual)
    assert torch.equal(residual, total)
    assert torch.equal(x, before)
    assert torch.equal(out, ops.rms_norm(total, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_heads_of_a_packed_row_in_place(backend: Backend, width: int, dtype: torch.dtype) -> None:
    packed = random(6, 4, width, dtype=dtype).to(backend.device)
    weight = random(width, seed=1).to(backend.device)
    heads = packed[:, 1:3]
    untouched = packed[:, [0, 3]].clone()
    expected = ops.rms_norm(heads.reshape(12, width), weight, EPS).view(6, 2, width)
    ops.rms_norm(heads, weight, EPS, out=heads)
    assert torch.equal(heads, expected)
    assert torch.equal(packed[:, [0, 3]], untouched)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 256, 1000, 2048])
def test_bits_depend_on_the_row_alone(backend: Backend, width: int, dtype: torch.dtype) -> None:
    rows = 300 if backend.name != "simt" else 30
    x = random(rows, width, dtype=dtype).to(backend.device)
    weight = random(width, seed=1).to(backend.device)
    alone = torch.cat([ops.rms_norm(x[i : i + 1], weight, EPS) for i in range(rows)])
    for count in (1, 2, 23, rows):
        assert torch.equal(ops.rms_norm(x[:count], weight, EPS), alone[:count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_isa_or_threads(dtype: torch.dtype) -> None:
    x, residual = (random(60, 1000, seed=s, dtype=dtype) for s in (0, 1))
    weight = random(1000, seed=2)
    isa, threads = _C.active_isa(), torch.get_num_threads()
    expected = ops.rms_norm(x, weight, EPS, total := residual.clone())
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                out = ops.rms_norm(x, weight, EPS, summed := residual.clone())
                assert torch.equal(out, expected) and torch.equal(summed, total), (name, count)
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 250, 1000, 8200])
@pytest.mark.parametrize("pad", [1, 8])
def test_bits_do_not_depend_on_strides_and_nothing_around_is_touched(
    backend: Backend, width: int, pad: int, dtype: torch.dtype
) -> None:
    x, residual = (random(3, width, seed=s, dtype=dtype).to(backend.device) for s in (0, 1))
    weight = random(width, seed=2).to(backend.device)
    expected = ops.rms_norm(x, weight, EPS, total := residual.clone())
    rooms, views = zip(*(spread(t, pad) for t in (x, residual, x)), strict=True)
    ops.rms_norm(views[0], weight, EPS, *views[1:])
    for room, view, right in zip(rooms, views, (x, total, expected), strict=True):
        assert torch.equal(view, right)
        assert int(room.isnan().sum()) == room.numel() - x.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_instruction_set(dtype: torch.dtype) -> None:
    x, residual = (random(4, 250, seed=s, dtype=dtype) for s in (0, 1))
    weight = random(250, seed=2)
    expected = ops.rms_norm(x, weight, EPS, total := residual.clone())
    before = _C.active_isa()
    try:
        for isa in _C.build_info()["cpu_isas"]:
            _C.set_isa(isa)
            assert torch.equal(ops.rms_norm(x, weight, EPS, kept := residual.clone()), expected)
            assert torch.equal(kept, total)
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)])
def test_nothing_to_do(backend: Backend, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=backend.device)
    assert ops.rms_norm(x, torch.zeros(shape[-1], device=backend.device), EPS).shape == shape


HALF = torch.zeros(2, 16, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16)}, r"x: expected \[M, H\] or \[M, S, H\], got \[16\]"),
        ({"x": torch.zeros(2, 16).double()}, "x: expected float32, bfloat16 or float16, got"),
        ({"weight": torch.zeros(15)}, r"weight: expected \[H\] = \[16\]"),
        ({"weight": HALF[0]}, r"weight: expected \[H\] = \[16\] float32, got \[16\] bfloat16"),
        ({"residual": torch.zeros(3, 16)}, r"residual: expected \[M, H\] = \[2, 16\]"),
        ({"residual": HALF}, r"residual: expected float32 like x, got \[2, 16\] bfloat16"),
        ({"out": HALF}, r"out: expected float32 like x, got \[2, 16\] bfloat16"),
        ({"x": torch.zeros(16, 2).t()}, "x: the last dimension must be contiguous"),
    ],
)
def test_wrong_arguments_are_named(
    backend: Backend, change: dict[str, Tensor], message: str
) -> None:
    tensors = {"x": torch.zeros(2, 16), "weight": torch.zeros(16), "out": torch.zeros(2, 16)}
    moved = {name: value.to(backend.device) for name, value in (tensors | change).items()}
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(**moved, eps=EPS)


@pytest.mark.parametrize("name", ["weight", "residual", "out"])
def test_tensors_on_two_devices_are_named(name: str) -> None:
    tensors: dict[str, Any] = {n: torch.zeros(2, 16) for n in ("x", "residual", "out")}
    tensors["weight"] = torch.zeros(16)
    tensors[name] = OnAnotherGpu(tensors[name])
    message = f"^{name}: expected a tensor on cpu as x is, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(**tensors, eps=EPS)


def test_under_torch_compile(device: torch.device) -> None:
    x, weight, residual = (
        t.to(device) for t in (random(3, 16), random(16, seed=1), random(3, 16, seed=2))
    )

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor, residual: Tensor) -> Tensor:
        return ops.rms_norm(x, weight, EPS, residual) + residual

    expected = ops.rms_norm(x, weight, EPS, kept := residual.clone()) + kept
    assert torch.equal(step(x, residual), expected)
