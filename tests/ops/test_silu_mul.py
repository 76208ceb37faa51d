from __future__ import annotations

import pytest
import torch

from specrt import _C
from specrt.ops import silu_mul


@pytest.mark.parametrize("width", [1, 16, 37, 400])
@pytest.mark.parametrize("rows", [1, 5])
def test_error_within_twice_torchs(rows: int, width: int) -> None:
    x = 4 * torch.randn(rows, 2 * width + 3, generator=torch.Generator().manual_seed(0))
    x = x[:, : 2 * width]  # strided rows
    out = silu_mul(x, torch.full((rows, width), float("nan")))
    gate, up = x.chunk(2, 1)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    theirs = (torch.nn.functional.silu(gate) * up - exact).abs().max()
    assert (out - exact).abs().max() <= 2 * theirs + 1e-6


def test_extremes() -> None:
    inf, nan = float("inf"), float("nan")
    out = silu_mul(torch.tensor([[100.0, -100.0, 0.0, inf, nan, 1.0, 1.0, 1.0, 1.0, 1.0]]))[0]
    assert out[0] == 100 and abs(out[1]) < 1e-30 and out[2] == 0
    assert out[3] == inf and out[4].isnan()


def test_bits_do_not_depend_on_rows_isa_or_threads() -> None:
    x = torch.randn(50, 2 * 411, generator=torch.Generator().manual_seed(1))
    expected = silu_mul(x)
    isa, threads = _C.active_isa(), torch.get_num_threads()
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(silu_mul(x), expected), (name, count)
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)
    for row in (0, 7, 49):
        assert torch.equal(silu_mul(x[row : row + 1]), expected[row : row + 1])


def test_a_wrong_argument_is_named() -> None:
    with pytest.raises(ValueError, match="^gate_up: expected an even"):
        silu_mul(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="^gate_up:"):
        silu_mul(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="^out:"):
        silu_mul(torch.zeros(2, 4), torch.zeros(2, 3))


def test_compiles() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.compile(silu_mul, fullgraph=True, backend="aot_eager")(x), silu_mul(x))
