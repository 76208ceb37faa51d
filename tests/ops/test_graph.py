"""Captured launches: of a GPU as a CUDA graph (the shim's is a list of launches), of the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch

from specrt import ops
from specrt.ops.build import build_info
from specrt.ops.graph import CpuGraph, CudaGraph
from tests.interrupts import interrupted
from tests.ops.conftest import Backend, OnAnotherGpu, use_simt

SIMT_SCHEDULES = (1,)
ROWS, WIDTH = 3, 64
GPU = torch.device("cuda", 0)


class Shim:
    """The shim's module, of whose graphs only those made from here on count."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._num_before = module, module.num_graph_objects()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def num_graph_objects(self) -> int:
        return self._module.num_graph_objects() - self._num_before


@pytest.fixture(scope="module", autouse=True)
def _is_collected() -> None:
    """What other tests have left, before anything is counted."""
    gc.collect()


@pytest.fixture
def simt(monkeypatch: pytest.MonkeyPatch) -> Shim:
    return Shim(use_simt(1, monkeypatch.setattr))


class Norms:
    """Two launches, the second of what the first gives."""

    def __init__(self, device: torch.device) -> None:
        self.x, self.middle, self.out = torch.full((3, ROWS, WIDTH), torch.nan, device=device)
        self.weights = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5)).to(device)
        self.num_calls = 0

    def launch(self) -> None:
        self.num_calls += 1
        ops.rms_norm(self.x, self.weights[0], 0.25, out=self.middle)
        ops.rms_norm(self.middle, self.weights[1], 1e-6, out=self.out)

    def fill(self, seed: int) -> torch.Tensor:
        """New rows; what comes of them when launched one by one."""
        rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))
        self.x.copy_(rows)
        self.launch()
        expected = self.out.clone()
        self.middle.fill_(torch.nan)
        self.out.fill_(torch.nan)
        return expected


def capture(backend: Backend, launch: Callable[[], None]) -> CpuGraph | CudaGraph:
    if backend.runs_cuda_source:
        return CudaGraph.capture(launch, backend.device)
    return CpuGraph.capture(launch)


def test_a_graph_runs_on_present_contents(backend: Backend) -> None:
    norms = Norms(backend.device)
    norms.fill(0)
    graph = capture(backend, norms.launch)
    assert graph.num_launches == 2
    # A GPU's launches are captured and not run.
    assert bool(norms.out.isnan().all()) == backend.runs_cuda_source
    num_calls = norms.num_calls
    for seed in range(3):
        expected = norms.fill(seed)
        graph.launch()
        assert torch.equal(norms.out, expected)
    assert norms.num_calls == num_calls + 3  # those of `fill`


def test_launches_of_another_thread_are_let_alone(backend: Backend) -> None:
    ours, theirs = Norms(backend.device), Norms(backend.device)
    ours.fill(0)
    expected = theirs.fill(1)

    def launch() -> None:
        thread = Thread(target=theirs.launch)
        thread.start()
        thread.join()
        ours.launch()

    graph = capture(backend, launch)
    assert graph.num_launches == 2
    assert torch.equal(theirs.out, expected)


# --- what a GPU's graph refuses -------------------------------------------------------------------


def test_what_is_raised_leaves_nothing(simt: Shim) -> None:
    norms = Norms(torch.device("cpu"))
    for error in (ValueError("no"), KeyboardInterrupt(), MemoryError()):

        def fail(error: BaseException = error) -> None:
            norms.launch()
            raise error

        with pytest.raises(type(error)):
            CudaGraph.capture(fail, GPU)
        assert simt.num_graph_objects() == 0
        assert torch.equal(norms.fill(1), norms.fill(1))  # runs at once


def test_an_interrupt_leaves_nothing(simt: Shim) -> None:
    norms, number = Norms(torch.device("cpu")), 1
    while interrupted(lambda: CudaGraph.capture(norms.launch, GPU), number):
        assert simt.num_graph_objects() == 0
        assert not norms.fill(number).isnan().any()
        number += 1
    assert number > 4


def test_ops_of_torch_would_be_missing(simt: Shim) -> None:
    x, norms = torch.ones(4, 4), Norms(torch.device("cpu"))
    forbidden: dict[str, Callable[[], Any]] = {
        "aten.add.Tensor": lambda: x + 1,
        "aten.copy_": lambda: x.copy_(x),
        "aten.empty": lambda: torch.empty(3),
        "aten._local_scalar_dense": lambda: x[0, 0].item(),
        "aten.clone": lambda: x.T.contiguous(),
    }
    for name, call in forbidden.items():

        def launch(call: Callable[[], Any] = call) -> None:
            norms.launch()
            call()

        with pytest.raises(RuntimeError, match=f"none of torch's ops, and {name}"):
            CudaGraph.capture(launch, GPU)
    assert simt.num_graph_objects() == 0

    def views() -> None:
        x.view(2, 8)[1:].unsqueeze(0).expand(3, 1, 8).transpose(0, 1)
        norms.launch()

    assert CudaGraph.capture(views, GPU).num_launches == 2


def test_a_capture_that_a_foreign_call_ended(simt: Shim) -> None:
    norms = Norms(torch.device("cpu"))

    def before() -> None:
        simt.synchronize()
        norms.launch()

    def behind() -> None:
        norms.launch()
        simt.synchronize()

    for launch in (before, behind):
        with pytest.raises(RuntimeError, match="due to a previous error during capture"):
            CudaGraph.capture(launch, GPU)
        assert simt.num_graph_objects() == 0
    assert not norms.fill(0).isnan().any()


@pytest.mark.parametrize(
    "call",
    ["cudaStreamCreate", "cudaStreamBeginCapture", "cudaGraphInstantiate", "cudaGraphUpload"],
)
def test_no_memory(simt: Shim, call: str) -> None:
    norms = Norms(torch.device("cpu"))
    simt.fail_next(call)
    with pytest.raises(RuntimeError, match=f"{call}: out of memory"):
        CudaGraph.capture(norms.launch, GPU)
    assert simt.num_graph_objects() == 0
    assert CudaGraph.capture(norms.launch, GPU).num_launches == 2


def test_one_capture_at_a_time(simt: Shim) -> None:
    norms = Norms(torch.device("cpu"))
    graph = CudaGraph.capture(norms.launch, GPU)
    with pytest.raises(RuntimeError, match="this thread is already capturing"):
        CudaGraph.capture(lambda: CudaGraph.capture(norms.launch, GPU) and None, GPU)
    with pytest.raises(RuntimeError, match="while this thread is capturing another"):
        CudaGraph.capture(graph.launch, GPU)
    del graph
    assert simt.num_graph_objects() == 0


# --- devices, memory, faults ----------------------------------------------------------------------


def test_a_graph_is_of_one_device(simt: Shim) -> None:
    norms = Norms(torch.device("cpu"))
    expected = norms.fill(0)

    def there() -> None:
        x, weight, middle = map(OnAnotherGpu, (norms.x, norms.weights[0], norms.middle))
        simt.rms_norm(x, weight, 0.25, None, middle)

    with pytest.raises(RuntimeError, match="cuda:0 is being captured, and a launch for cuda:1"):
        CudaGraph.capture(there, GPU)
    graph = CudaGraph.capture(there, torch.device("cuda", 1))
    assert simt.current_device() == 0
    graph.launch()
    assert simt.last_device() == 1 and simt.current_device() == 0
    ops.rms_norm(norms.middle, norms.weights[1], 1e-6, out=norms.out)
    assert torch.equal(norms.out, expected)


def test_memory_is_told_where_it_can_be(simt: Shim) -> None:
    norms = Norms(torch.device("cpu"))
    assert CudaGraph.capture(norms.launch, GPU).num_bytes == 2 * 1024
    simt.fail_next("cudaMemGetInfo")
    assert CudaGraph.capture(norms.launch, GPU).num_bytes == 0


def test_a_device_that_is_lost(simt: Shim) -> None:
    norms = Norms(torch.device("cpu"))
    norms.fill(0)
    graph = CudaGraph.capture(norms.launch, GPU)
    simt.break_device(1)
    with pytest.raises(RuntimeError, match="an illegal memory access was encountered"):
        graph.launch()
    del graph
    assert simt.num_graph_objects() == 0
    simt.set_device()


def test_a_build_without_cuda_has_no_graphs() -> None:
    if build_info().cuda is not None:
        pytest.skip("a build with CUDA")
    with pytest.raises(RuntimeError, match="this build of specrt has no CUDA kernels"):
        CudaGraph.capture(lambda: None, GPU)
