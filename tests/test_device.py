"""A device: captured steps run what was launched, on present contents; what goes there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from specrt import ops
from specrt.device import Device
from specrt.ops.graph import CpuGraph
from tests.ops.conftest import load_simt
from tests.real_gpu import real_gpu
from tests.simulated_gpu import SimulatedGpu, only_simulated


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


# --- a GPU's steps --------------------------------------------------------------------------------


class Step:
    """A norm of rows on a GPU, which notes how often it is launched by the host."""

    def __init__(self, gpu: Device) -> None:
        self._gpu = gpu
        self._x, self._out = gpu.zeros(3, 64), gpu.zeros(3, 64)
        self._weight = gpu.there(torch.linspace(0.5, 2, 64))
        self.num_calls = 0

    def launch(self) -> None:
        self.num_calls += 1
        ops.rms_norm(self._x, self._weight, 1e-6, out=self._out)

    def with_torch(self) -> None:
        self.launch()
        self._out.mul_(2)

    def fill(self, seed: int) -> torch.Tensor:
        """New rows, and poison where the result goes; which is expected to be this."""
        rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
        self._gpu.upload(rows, self._x)
        self._out.fill_(torch.nan)
        there = ops.rms_norm(self._x, self._weight, 1e-6, out=self._gpu.zeros(3, 64))
        return self._gpu.read(there)

    def result(self) -> torch.Tensor:
        return self._gpu.read(self._out)


def test_a_gpu_captures_a_step_the_second_time(gpu: Device) -> None:
    step = Step(gpu)
    for number in range(5):
        expected = step.fill(number)
        assert gpu.run("step", step.launch) == (number > 0)
        assert torch.equal(step.result(), expected)
        assert step.num_calls == min(2, number + 1)
    gpu.forget()
    assert gpu.version == 1 and gpu.graph_bytes == 0
    expected = step.fill(9)
    assert not gpu.run("step", step.launch)
    assert torch.equal(step.result(), expected) and step.num_calls == 3


@only_simulated
def test_graphs_are_few_and_say_what_they_take(
    gpu: SimulatedGpu, caplog: pytest.LogCaptureFixture
) -> None:
    simt, step, device = load_simt(), Step(gpu), Device(is_gpu=True, max_steps=2)
    gc.collect()
    before = simt.num_graph_objects()
    caplog.set_level("DEBUG", "specrt")
    for name in "aabbcc":
        device.run(name, step.launch)
    assert "cpu: a graph of 1 launches, 1024 bytes" in caplog.text
    assert device.graph_bytes == 2 * 1024
    assert simt.num_graph_objects() == before + 2
    device.forget()
    assert (simt.num_graph_objects(), device.graph_bytes) == (before, 0)


def test_a_step_that_cannot_be_captured_is_launched(
    gpu: Device, caplog: pytest.LogCaptureFixture
) -> None:
    step, device = Step(gpu), Device(gpu.place, is_gpu=True)
    for number in range(4):
        for name in ("step", "another"):
            expected = 2 * step.fill(number)
            device.run(name, step.with_torch)
            assert torch.equal(step.result(), expected)
    assert step.num_calls == 2 * (4 + 1)  # one of them in vain
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "without a graph, which is slower: a graph holds none" in said[0]


@only_simulated
def test_no_memory_for_a_graph(gpu: SimulatedGpu, caplog: pytest.LogCaptureFixture) -> None:
    step, device = Step(gpu), Device(is_gpu=True)
    load_simt().fail_next("cudaGraphInstantiate")
    for number in range(3):
        expected = step.fill(number)
        device.run("step", step.launch)
        assert torch.equal(step.result(), expected)
    assert step.num_calls == 4 and "cudaGraphInstantiate: out of memory" in caplog.text


@only_simulated
def test_an_eager_gpu_captures_nothing(gpu: SimulatedGpu) -> None:
    step, eager = Step(gpu), Device(is_gpu=True, is_eager=True)
    gc.collect()
    before = load_simt().num_graph_objects()
    for _ in range(3):
        eager.run("step", step.with_torch)
    assert step.num_calls == 3 and load_simt().num_graph_objects() == before


def test_tests_of_a_gpu_may_insist_on_graphs(gpu: Device) -> None:
    """Nothing but launches is in a graph: no memory is made in it, nothing goes up or down."""
    step, rows, host = Step(gpu), gpu.zeros(3), torch.zeros(3)
    forbidden: dict[str, Callable[[], object]] = {
        "op": lambda: rows.mul_(2),
        "zeros": lambda: gpu.zeros(3),
        "empty": lambda: gpu.empty(3),
        "there": lambda: gpu.there(host),
        "upload": lambda: gpu.upload(host, rows),
        "post": lambda: gpu.post(rows),
        "read": lambda: gpu.read(rows),
    }
    for name, call in forbidden.items():

        def launch(call: Callable[[], object] = call) -> None:
            step.launch()
            call()

        gpu.run(name, launch)
        with pytest.raises(AssertionError, match="cannot be captured: a graph holds none of"):
            gpu.run(name, launch)


@pytest.mark.parametrize("is_within", [False, True])
def test_a_step_of_steps_is_one_graph(gpu: Device, is_within: bool) -> None:
    """Whatever ran before by itself."""
    step, both = Step(gpu), 0

    def launch() -> None:
        nonlocal both
        both += 1
        gpu.run("inner", step.launch)

    for number in range(4):
        if is_within:
            gpu.run("inner", step.launch)
        expected = step.fill(number)
        gpu.run("outer", launch)
        assert torch.equal(step.result(), expected)
    assert both == 2


def test_a_step_that_raises_is_not_captured(gpu: Device) -> None:
    step, number = Step(gpu), 0

    def launch() -> None:
        nonlocal number
        step.launch()
        number += 1
        if number < 4:
            raise (KeyboardInterrupt if number > 2 else ValueError)("here")

    for error in (ValueError, ValueError, KeyboardInterrupt):
        if number == 1:
            gpu.run("step", step.launch)  # so that it is captured as it raises
        with pytest.raises(error, match="here"):
            gpu.run("step", launch)
    expected = step.fill(0)
    gpu.run("step", launch)
    assert torch.equal(step.result(), expected)


# --- what goes to the host ------------------------------------------------------------------------


def test_copies_to_the_host_are_of_their_moment(gpu: Device) -> None:
    """Several are under way while what they were made of is written again; read in any order."""
    x, before = gpu.zeros(5), gpu.num_reads
    posted = []
    for number in range(6):
        gpu.upload(torch.full((5,), float(number)), x)
        posted.append(gpu.post(x))
    assert gpu.num_reads == before
    for number in (3, 0, 5, 1, 3, 2):
        assert posted[number].read().tolist() == [number] * 5
    assert gpu.num_reads == before + 5  # one of them twice
    assert gpu.read(x).tolist() == [5.0] * 5


def test_on_the_cpu_nothing_is_copied() -> None:
    x, device = torch.zeros(3), Device()
    posted = device.post(x)
    x.fill_(1)
    assert posted.read() is x and device.num_reads == 0


class FakeStream:
    """One of torch's, which writes down what it waits for."""

    def __init__(self, name: object) -> None:
        self.name, self.waits = name, list[FakeStream]()

    def wait_stream(self, other: FakeStream) -> None:
        self.waits.append(other)


def test_work_on_a_gpu_is_in_order_with_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [FakeStream("caller's")]

    @contextmanager
    def use(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    cuda = SimpleNamespace(current_stream=lambda place: current[-1], Stream=FakeStream, stream=use)
    monkeypatch.setattr(torch, "cuda", cuda)
    device, caller = Device(torch.device("cuda", 0)), current[0]
    with device.working():
        own = current[-1]
        assert own is not caller and own.waits == [caller] and not caller.waits
        with device.working():
            assert current[-1] is own
        assert own.waits == [caller] and not caller.waits
    assert current == [caller] and caller.waits == [own]

    def fail() -> None:
        with device.working():
            assert current[-1] is own
            raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        fail()
    assert current == [caller] and caller.waits == [own, own]


def test_work_elsewhere_is_where_it_is(gpu: Device) -> None:
    step = Step(gpu)
    expected = step.fill(0)
    for device in (gpu, Device()):
        with device.working(), device.working():
            gpu.run("step", step.launch)
    assert torch.equal(step.result(), expected)


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
