"""Moments of a device's work."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from specrt import ops
from specrt.ops.graph import CpuGraph
from tests.ops.conftest import Backend, OnAnotherGpu, load_simt


def test_moments_follow_one_another(backend: Backend) -> None:
    """Between two of them at least what the host has slept has gone by, in nanoseconds."""
    stamps = torch.full((4,), -1, dtype=torch.int64, device=backend.device)
    before = time.perf_counter_ns()
    ops.time_stamp(stamps[1:2])
    stamps.tolist()  # a GPU has come there
    time.sleep(0.02)
    ops.time_stamp(stamps[2:3])
    first, *moments, last = stamps.tolist()
    whole = time.perf_counter_ns() - before
    assert first == last == -1
    assert 0.019e9 <= moments[1] - moments[0] <= whole + 1e6


def test_a_graph_looks_anew(backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("graphs of a GPU: tests/ops/test_graph.py")
    stamp = torch.zeros(1, dtype=torch.int64)
    graph = CpuGraph.capture(lambda: ops.time_stamp(stamp))
    graph.launch()
    first = int(stamp)
    graph.launch()
    assert 0 < first <= int(stamp)


def test_a_launch_is_on_its_tensors_device(backend: Backend) -> None:
    if backend.name != "simt":
        pytest.skip("a second GPU, as only the shim has one")
    stamp, simt = torch.zeros(1, dtype=torch.int64), load_simt()
    another: Any = OnAnotherGpu(stamp)
    ops.time_stamp(another)
    assert simt.last_device() == 1 and simt.current_device() == 0 and int(stamp) > 0


@pytest.mark.parametrize(
    ("stamp", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), r"out: expected \[1\] = \[1\] int64, got \[2\]"),
        (torch.zeros(1, dtype=torch.int32), r"out: expected \[1\] = \[1\] int64, got \[1\] int32"),
    ],
)
def test_what_does_not_fit(backend: Backend, stamp: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.time_stamp(stamp.to(backend.device))
