"""A device: captured steps run what was launched, on present contents; what goes there."""

from __future__ import annotations

import pytest
import torch

from specrt import ops
from specrt.device import Device
from specrt.ops.graph import CpuGraph
from tests.real_gpu import real_gpu


def test_a_graph_reads_the_present_contents() -> None:
    x, middle, out = torch.randn(4, 32), torch.empty(4, 24), torch.empty(4, 24)
    weight, norm = torch.randn(24, 32), torch.randn(24)

    def launch() -> None:
        ops.linear(x, weight, out=middle)
        ops.rms_norm(middle, norm, 1e-6, out=out)

    graph = CpuGraph.capture(launch)
    assert graph.num_launches == 2
    for _ in range(3):
        x.copy_(torch.randn(4, 32))
        expected = ops.rms_norm(ops.linear(x, weight), norm, 1e-6)
        out.fill_(float("nan"))
        graph.launch()
        assert torch.equal(out, expected)


def test_the_cache_launches_once_until_cleared() -> None:
    x, out, weight = torch.randn(1, 16), torch.empty(1, 8), torch.randn(8, 16)
    calls = []

    def launch() -> None:
        calls.append(1)
        ops.linear(x, weight, out=out)

    device = Device()
    for _ in range(3):
        device.run("step", launch)
    assert len(calls) == 1
    device.forget()
    device.run("step", launch)
    assert len(calls) == 2


def test_the_device_that_run_are_kept() -> None:
    """Beyond the most that are kept, the one goes that was not run for longest."""
    x, out, weight = torch.randn(1, 16), torch.empty(1, 8), torch.randn(8, 16)
    captured = list[str]()

    def run(name: str) -> None:
        def launch() -> None:
            captured.append(name)
            ops.linear(x, weight, out=out)

        device.run(name, launch)

    device = Device(max_steps=3)
    for name in "abcadaebda":
        run(name)
    assert "".join(captured) == "abcdebda"


def test_a_failing_launch_captures_nothing() -> None:
    device = Device()
    x, out = torch.ones(1, 4), torch.empty(1, 2)

    def bad() -> None:
        ops.linear(x, torch.zeros(2, 5), out=out)

    def good() -> None:
        ops.linear(x, torch.ones(2, 4), out=out)

    with pytest.raises(ValueError, match="x: expected"):
        device.run("step", bad)
    device.run("step", good)
    assert out.tolist() == [[4.0, 4.0]]


# --- memory ---------------------------------------------------------------------------------------


def test_tables_on_their_way_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a GPU may read late is copied into pinned memory first."""
    table, pinned, out = torch.arange(3), torch.arange(3) + 7, torch.zeros(3, dtype=torch.int64)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned)
    for device, sent in ((Device(torch.device("cuda", 0)), pinned), (Device(), table)):
        device.upload(table, out)
        assert torch.equal(out, sent)


@pytest.mark.gpu
def test_a_table_that_is_written_again_at_once() -> None:
    device, busy = Device(torch.device("cuda")), torch.randn(8192, 8192, device="cuda")
    arrived = []
    for i in range(100):
        busy = busy @ busy  # the copies wait behind it
        table = torch.full((64,), i, dtype=torch.int32)
        arrived.append(device.there(table))
        table.fill_(-1)
    assert all(bool((there == i).all()) for i, there in enumerate(arrived))


@pytest.mark.gpu
def test_who_waits_for_a_gpu_is_told() -> None:
    """Or tests of whole engines there would prove nothing."""
    with real_gpu() as gpu:
        there = gpu.zeros(3)
        with pytest.raises(RuntimeError, match="synchroniz"):
            there.sum().item()
        assert gpu.read(there).tolist() == [0.0] * 3
