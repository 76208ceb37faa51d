"""The machines that a kernel's tests run on: the CPU, a GPU, and the SIMT shim in between.

Under ``simt`` a wrapper of ``specrt.ops`` calls ``tests/simt/_simt*.so``, where the CUDA sources
are compiled as C++ and CPU tensors count as those of GPU 0; so a test's body is the same three
ways. A module may name the schedules of threads that its kernels run under, ``SIMT_SCHEDULES``;
tests of all but the first are slow ones. A test marked ``tensor_cores`` runs once more with each
GPU's sums that the mark names.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from specrt.ops import registry
from tests.linear_stand_in import stand_in


@dataclass(frozen=True)
class Backend:
    """Where a test runs; its tensors are made with ``device=backend.device``."""

    name: str  # "cpu", "simt" or "cuda"
    device: torch.device

    @property
    def runs_cuda_source(self) -> bool:
        return self.name != "cpu"

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """As :func:`held`, where the backend has its tensors."""
        return held(tensor, self.device)


def held(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on a device, strides and offset included: ``to`` leaves neither of a part."""
    count = tensor.untyped_storage().nbytes() // tensor.itemsize
    there = tensor.as_strided((count,), (1,), storage_offset=0).to(device)
    return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class OnAnotherGpu:
    """A tensor as the extension sees it, by duck type, but on GPU 1: only the shim may read it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.data_ptr, self.stride = tensor.data_ptr, tensor.stride
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.untyped_storage = tensor.untyped_storage
        self.device = torch.device("cuda", 1)


def needs_gpu(*values: object, id: str) -> object:
    return pytest.param(*values, id=id, marks=pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    if metafunc.definition.get_closest_marker("gpu"):  # the module's fixtures ask, not the test
        metafunc.parametrize("backend", [pytest.param(("cuda",), id="cuda")], indirect=True)
        return
    first, *others = getattr(metafunc.module, "SIMT_SCHEDULES", (1,))
    simt = [pytest.param(("simt", first, "ieee"), id=f"simt{first}" if others else "simt")]
    simt += [
        pytest.param(("simt", seed, "ieee"), id=f"simt{seed}", marks=pytest.mark.slow)
        for seed in others
    ]
    for mark in metafunc.definition.iter_markers("tensor_cores"):
        simt += [pytest.param(("simt", first, gpu), id=f"simt_{gpu}") for gpu in mark.args]
    cases = [pytest.param(("cpu",), id="cpu"), *simt, needs_gpu(("cuda",), id="cuda")]
    metafunc.parametrize("backend", cases, indirect=True)


def load_simt() -> ModuleType:
    try:
        return importlib.import_module("tests.simt._simt")
    except ModuleNotFoundError:
        pytest.fail("the SIMT shim is not built: run `make simt`")


def own_functions(module: ModuleType) -> list[str]:
    values = vars(module).items()
    return [name for name, value in values if getattr(value, "__module__", "") == module.__name__]


def use_simt(seed: int, replace: Callable[[object, str, object], None] = setattr) -> ModuleType:
    """Let the shim's kernels stand in for the extension's; ``replace`` sets attributes."""
    simt = load_simt()
    simt.set_schedule(seed)
    simt.set_device()
    replace(registry, "is_on_gpu", lambda tensor: True)
    for name, module in list(sys.modules.items()):
        if not name.startswith("specrt.ops."):
            continue
        if any(hasattr(simt, op) for op in own_functions(module)):
            replace(module, "_C", simt)
    return simt


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    name, *settings = request.param
    if name == "simt":
        seed, arithmetic = settings
        use_simt(seed, monkeypatch.setattr).set_arithmetic(arithmetic)
    return Backend(name, torch.device("cuda:0" if name == "cuda" else "cpu"))


@pytest.fixture
def stand_in_linear(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, ``linear`` of 16-bit rows is the CPU's product in a GPU's interface:
    under the shim the kernel's own time would be most of a test's."""
    if backend.name != "cuda":
        stand_in(monkeypatch, lambda x: x.dtype != torch.float32)


@pytest.fixture(params=["cpu", needs_gpu("cuda", id="cuda")])
def device(request: pytest.FixtureRequest) -> torch.device:
    """For what needs the extension itself (``torch.compile``), and so no shim."""
    return torch.device(request.param)
