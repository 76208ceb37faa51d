"""What the sanitizers run on a GPU (``bench.one_of_each``) runs everywhere, and finds a fault."""

from __future__ import annotations

import pytest
import torch

from bench import one_of_each
from bench.gpu import Place
from specrt import ops
from tests.ops.conftest import Backend


@pytest.mark.usefixtures("stand_in_linear")
def test_one_of_each(backend: Backend) -> None:
    torch.manual_seed(0)
    place = Place(str(backend.device))
    assert one_of_each.run_small_kernels(place) == 14 * 3 * 3
    if backend.runs_cuda_source:
        assert one_of_each.run_tree_attention(place) == 3 * 3


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    silu_mul = ops.silu_mul
    monkeypatch.setattr(ops, "silu_mul", lambda x, out: silu_mul(x, out=out).add_(1))
    with pytest.raises(AssertionError, match="not close"):
        one_of_each.run_small_kernels(Place("cpu"))
