"""Gate and up in turn: which rows go where, and that it is the same function."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from specrt import ops
from specrt.config import Form
from specrt.device import Device
from specrt.models.gate_up import interleaved
from specrt.models.layer import DecoderLayer, LayerBuffers
from specrt.models.step import Workspace
from tests.forms import form_config, form_weights
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
    shift = bias if has_bias else torch.zeros_like(bias)
    gate, up = (x.double() @ gate_up.double().T + shift).chunk(2, dim=1)
    exact = (F.silu(gate) * up).to(backend.device)
    config = form_config(Form(), hidden_size=64, intermediate_size=40, num_layers=1)
    like, device = form_weights(config).layers[0], Device(backend.device)
    for is_interleaved in (False, True):
        placed = [interleaved(t) if is_interleaved else t for t in (gate_up, bias)]
        matrix, vector = (tensor.to(backend.device) for tensor in placed)
        added = vector if has_bias else None
        weights = replace(like, post_norm=None, gate_up=matrix, gate_up_bias=added)
        layer = DecoderLayer(config, weights, 0, is_interleaved=is_interleaved)
        rooms = Workspace.make(config, 5, 0, x.dtype, device, is_interleaved=is_interleaved)
        workspace = torch.zeros(ops.linear_workspace(80, 64, 5), device=backend.device)
        out = layer.activate(x.to(backend.device), LayerBuffers(rooms, workspace, None))
        roundings = 1 if is_interleaved else 3  # gate and up are kept in 16 bits between
        bound = roundings * torch.finfo(x.dtype).eps * exact.abs() + 1e-2 * (not is_interleaved)
        assert ((out.double() - exact).abs() <= bound + 1e-5).all(), is_interleaved
