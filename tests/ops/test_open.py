"""``is_open``: of a level that nobody drafts any more, products read nothing and leave no trace."""

from __future__ import annotations

import pytest
import torch

from specrt import ops
from tests.ops.conftest import Backend
from tests.ops.test_feature_sample import Weights, inputs
from tests.ops.test_feature_sample_16_bits import there
from tests.ops.test_tile_maxima import maxima_for, random

SIMT_SCHEDULES = (1, 2)
NAN = float("nan")
Tensor = torch.Tensor


def flags(backend: Backend, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=backend.device)


def dtype_of(backend: Backend) -> torch.dtype:
    return torch.bfloat16 if backend.runs_cuda_source else torch.float32


# Without slices of K and with them; one block of threads and several.
@pytest.mark.parametrize(
    ("outputs", "depth", "rows"), [(200, 72, 5), (72, 1032, 9), (8, 1032, 300)]
)
def test_a_closed_product_leaves_no_trace(
    backend: Backend, outputs: int, depth: int, rows: int
) -> None:
    dtype, device = dtype_of(backend), backend.device
    x, weight, residual = (
        random(*shape, seed=i).to(device, dtype)
        for i, shape in enumerate([(rows, depth), (outputs, depth), (rows, outputs)])
    )
    workspace = torch.full((ops.linear_workspace(outputs, depth, rows),), NAN, device=device)
    workspace[:512] = 0
    before, out = workspace.clone(), torch.full_like(residual, NAN)

    def multiply(is_open: Tensor | None) -> Tensor:
        return ops.linear(x, weight, None, residual, out, workspace, is_open=is_open)

    assert multiply(flags(backend, 0, 0, 0)).isnan().all()
    assert torch.equal(workspace.view(torch.int32), before.view(torch.int32))
    expected = multiply(None).clone()
    for open_one in ((0, 0, -1), (1,), (0, 3)):
        out.fill_(NAN)
        assert torch.equal(multiply(flags(backend, *open_one)), expected)
        assert not workspace[:512].view(torch.int32).any(), "tickets"


def test_closed_logits_have_no_keys(backend: Backend) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("of the CUDA source")
    x, weight = (random(n, 72, seed=n).to(backend.device, torch.bfloat16) for n in (6, 200))
    maxima = maxima_for(backend, 6, 200)
    logits = torch.full((6, 200), NAN, device=backend.device)
    ops.linear(x, weight, out=logits, maxima=maxima, is_open=flags(backend, 0))
    assert logits.isnan().all() and (maxima.keys == 77).all()
    ops.linear(x, weight, out=logits, maxima=maxima, is_open=flags(backend, 2))
    assert not logits.isnan().any() and not (maxima.keys == 77).any()


@pytest.mark.usefixtures("stand_in_linear")
@pytest.mark.parametrize("wide", [None, 48])
@pytest.mark.parametrize("is_folded", [False, True])
def test_a_closed_level_keeps_its_features(
    backend: Backend, wide: int | None, is_folded: bool
) -> None:
    dtype = dtype_of(backend)
    weights = Weights.random(24, wide, dtype).folded(is_folded, is_folded)
    weights = there(weights, dtype, backend)
    tokens, features = inputs(5, 24)
    given = tokens.to(backend.device), None, features.to(backend.device, dtype)
    out = torch.full((5, 24), NAN, dtype=dtype, device=backend.device)
    assert weights.run(*given, out=out, is_open=flags(backend, 0, 0)).isnan().all()
    assert torch.equal(
        weights.run(*given, out=out, is_open=flags(backend, 0, 1)), weights.run(*given)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2), r"is_open: expected \[B\] = \[\*\] int32, got \[2\] float32"),
        (torch.zeros(2, 1, dtype=torch.int32), r"is_open: expected \[B\]"),
        (torch.zeros(4, dtype=torch.int32)[::2], "is_open: the last dimension must be contiguous"),
    ],
)
def test_flags_that_are_none(backend: Backend, given: Tensor, message: str) -> None:
    x = torch.zeros(2, 16, dtype=dtype_of(backend), device=backend.device)
    with pytest.raises(ValueError, match=message):
        ops.linear(x, x, is_open=backend.hold(given))
