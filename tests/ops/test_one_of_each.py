"""What the sanitizers run on a GPU (``bench.one_of_each``) runs everywhere, and finds a fault."""

from __future__ import annotations

import pytest
import torch

from bench import one_of_each, round_bits
from bench.fake_gpu import FakeGpu
from bench.gpu import Place
from specrt import ops
from tests.ops.conftest import Backend


@pytest.mark.usefixtures("stand_in_linear")
def test_one_of_each(backend: Backend) -> None:
    torch.manual_seed(0)
    place = Place(str(backend.device))
    assert one_of_each.run_small_kernels(place) == 21 * 3 * 3
    assert round_bits.run_round_bits(place, is_quick=backend.name == "simt") >= 20


@pytest.mark.slow
def test_one_of_tree_attention(backend: Backend) -> None:
    if backend.runs_cuda_source:
        torch.manual_seed(0)
        assert one_of_each.run_tree_attention(Place(str(backend.device))) == 3 * 3


def test_one_of_linear(backend: Backend) -> None:
    if backend.runs_cuda_source:
        torch.manual_seed(0)
        assert one_of_each.run_linear(Place(str(backend.device))) == 2 * 6


def test_linear_without_a_gpu() -> None:
    torch.manual_seed(0)
    assert one_of_each.run_linear(FakeGpu.place) == 6


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    activate = ops.activate
    monkeypatch.setattr(ops, "activate", lambda x, out: activate(x, out).add_(1))
    with pytest.raises(AssertionError, match="not close"):
        one_of_each.run_small_kernels(Place("cpu"))


def test_other_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second run, which stands for the host's."""
    rerank, calls = ops.tree_rerank, []

    def last_bit(*args: torch.Tensor) -> None:
        rerank(*args)
        calls.append(args)
        if len(calls) == 2:
            args[-1][1, 1].mul_(1 + 2**-22)

    monkeypatch.setattr(ops, "tree_rerank", last_bit)
    with pytest.raises(RuntimeError, match="draft tree of 131 rows: node_scores has other bits"):
        round_bits.run_round_bits(Place("cpu"), is_quick=True)
