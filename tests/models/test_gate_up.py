"""Gate and up in turn: which rows go where, and that it is the same function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specrt import ops
from specrt.models.gate_up import interleaved, launch_gated
from tests.ops.conftest import Backend


def test_eights_of_rows_in_turn() -> None:
    rows = torch.arange(48)
    expected = [*range(8), *range(24, 32), *range(8, 16), *range(32, 40)]
    expected += [*range(16, 24), *range(40, 48)]
    assert interleaved(rows).tolist() == expected
    matrix = rows[:, None] * 100 + torch.arange(3)
    assert torch.equal(interleaved(matrix), matrix[expected])
    assert rows.tolist() == list(range(48))  # a copy


@pytest.mark.parametrize("size", [1, 4, 12, 100])
def test_rows_that_are_not_eights(size: int) -> None:
    with pytest.raises(ValueError, match=f"intermediate_size: .* multiple of 8 .*, got {size};"):
        interleaved(torch.zeros(2 * size, 16))


@pytest.mark.usefixtures("stand_in_linear")
@pytest.mark.parametrize("has_bias", [False, True])
def test_in_turn_or_not_is_one_function(backend: Backend, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate_up, bias = (torch.randn(*s, generator=generator) for s in ((5, 64), (80, 64), (80,)))
    x, gate_up = x.bfloat16(), gate_up.bfloat16() / 8
    added = bias if has_bias else torch.zeros_like(bias)
    gate, up = (x.double() @ gate_up.double().T + added).chunk(2, dim=1)
    exact = (F.silu(gate) * up).to(backend.device)
    for is_interleaved in (False, True):
        placed = [interleaved(t) if is_interleaved else t for t in (gate_up, bias)]
        matrix, vector = (tensor.to(backend.device) for tensor in placed)
        out = torch.empty(5, 40, dtype=x.dtype, device=backend.device)
        between = x.new_empty(5, 0 if is_interleaved else 80, device=backend.device)
        workspace = torch.zeros(ops.linear_workspace(80, 64, 5), device=backend.device)
        launch_gated(
            x.to(backend.device),
            matrix,
            vector if has_bias else None,
            between,
            out,
            workspace,
            is_interleaved=is_interleaved,
        )
        roundings = 1 if is_interleaved else 3  # gate and up are kept in 16 bits between
        bound = roundings * torch.finfo(x.dtype).eps * exact.abs() + 1e-2 * (not is_interleaved)
        assert ((out.double() - exact).abs() <= bound + 1e-5).all(), is_interleaved
