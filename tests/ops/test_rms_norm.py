"""``rms_norm``: right to rounding, fused residual, heads, each row's bits its own."""

from __future__ import annotations

import pytest
import torch

from specrt import _C, ops

EPS = 1e-6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("width", [1, 15, 64, 250, 4096])
def test_as_exact_as_torch(width: int) -> None:
    x, weight = 3 * random(7, width), random(width, seed=1)
    exact = oracle(x, weight)
    usual = torch.nn.functional.rms_norm(x, (width,), weight, EPS)
    out = ops.rms_norm(x, weight, EPS, out=torch.full_like(x, float("nan")))
    assert (out - exact).abs().max() <= 2 * (usual - exact).abs().max() + 1e-6


def test_residual_is_added_first_and_kept() -> None:
    x, residual, weight = random(5, 48), random(5, 48, seed=1), random(48, seed=2)
    total = residual + x
    out = ops.rms_norm(x, weight, EPS, residual)
    assert torch.equal(residual, total)
    assert torch.equal(out, ops.rms_norm(total, weight, EPS))


def test_heads_of_a_packed_row_in_place() -> None:
    packed, weight = random(6, 4 * 32), random(32, seed=1)
    heads = packed.view(6, 4, 32)[:, 1:3]
    untouched = packed.view(6, 4, 32)[:, [0, 3]].clone()
    expected = ops.rms_norm(heads.reshape(12, 32), weight, EPS).view(6, 2, 32)
    ops.rms_norm(heads, weight, EPS, out=heads)
    assert torch.equal(heads, expected)
    assert torch.equal(packed.view(6, 4, 32)[:, [0, 3]], untouched)


@pytest.mark.parametrize("width", [33, 256])
def test_bits_depend_on_the_row_alone(width: int) -> None:
    x, weight = random(300, width), random(width, seed=1)
    alone = torch.cat([ops.rms_norm(x[i : i + 1], weight, EPS) for i in range(300)])
    before = _C.active_isa()
    try:
        for isa in _C.build_info()["cpu_isas"]:
            _C.set_isa(isa)
            for rows in (1, 2, 63, 300):
                assert torch.equal(ops.rms_norm(x[:rows], weight, EPS), alone[:rows])
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16)}, r"x: expected \[M, H\] or \[M, S, H\], got \[16\]"),
        ({"weight": torch.zeros(15)}, r"weight: expected \[H\] = \[16\]"),
        ({"residual": torch.zeros(3, 16)}, r"residual: expected \[M, H\] = \[2, 16\]"),
        ({"out": torch.zeros(2, 16, dtype=torch.bfloat16)}, "out: expected .* bfloat16"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(2, 16), "weight": torch.zeros(16), "eps": EPS, **change}
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(**arguments)  # type: ignore[arg-type]


def test_under_torch_compile() -> None:
    x, weight, residual = random(3, 16), random(16, seed=1), random(3, 16, seed=2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, weight, EPS, residual) + residual

    expected = ops.rms_norm(x, weight, EPS, kept := residual.clone()) + kept
    assert torch.equal(step(x, residual), expected)
