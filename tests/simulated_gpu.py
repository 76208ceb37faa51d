"""A GPU that is not there: its memory is the CPU's, its kernels are the SIMT shim's.

Unlike the fixture ``backend``, which takes every tensor for a GPU's, this one knows what lies
where: what was made by a :class:`SimulatedGpu`, and what came of it. As on a GPU it is an error to
mix both memories, to give a kernel the host's tensors, and to wait for a value anywhere but in
:meth:`~specrt.device.Device.read`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specrt import _C
from specrt.device import Device, Posted
from specrt.ops import registry
from tests.linear_stand_in import stand_in

_WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_consecutive.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.bincount.default,
}
"""What makes the host wait for a GPU, or makes shapes of what is there."""
_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
_MASKS = {torch.bool, torch.uint8}


class SimulatedGpu(Device):
    """A device whose tensors are the CPU's, and marked."""

    def __init__(self) -> None:
        super().__init__(is_gpu=True)
        # Weak references keep a storage's identity, so that no later one is taken for it.
        self._storages: dict[int, StorageWeakRef] = {}
        self.is_moving = False
        """Whether a copy from one memory to the other is under way."""
        self.is_strict = True
        """Whether a step that cannot be captured is an error, rather than launched without a graph.
        """

    def __repr__(self) -> str:
        return "simulated"

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mark what lies there."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._storages[reference.cdata] = reference
        return tensor

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.hold(super().zeros(*shape, dtype=dtype))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made = super().empty(*shape, dtype=dtype)
        return self.hold(made.fill_(float("nan") if dtype.is_floating_point else 77))

    def upload(self, host: torch.Tensor, out: torch.Tensor) -> None:
        assert self.holds(out) and not self.holds(host), "upload: from the host to the device"
        with self.moving():
            super().upload(host, out)

    def moved(self, host: torch.Tensor) -> torch.Tensor:
        assert not self.holds(host), "moved: from the host"
        return self.hold(host.clone())

    def post(self, tensor: torch.Tensor) -> Posted:
        assert self.holds(tensor), "post: of what is there"
        with self.moving():
            return super().post(tensor)

    def _warn(self, reason: str) -> None:
        assert not self.is_strict, f"a step cannot be captured: {reason}"

    @contextmanager
    def moving(self) -> Iterator[None]:
        """What is done meanwhile may see both memories."""
        before, self.is_moving = self.is_moving, True
        try:
            yield
        finally:
            self.is_moving = before


class _Watch(TorchDispatchMode):
    """Refuses what a GPU would refuse, and marks what comes of its tensors."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu = kwargs or {}, self._gpu
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        held = [gpu.holds(tensor) for tensor in given]
        if gpu.is_moving or not any(held):
            return func(*args, **kwargs)
        assert not _waits(func, args), f"{func}: the host would wait for the GPU"
        alien = [x.shape for x, is_held in zip(given, held, strict=True) if not is_held and x.dim()]
        assert not alien, f"{func}: tensors of the GPU and of the host, {alien}"
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                gpu.hold(tensor)
        return out


def _waits(func: Any, args: Sequence[Any]) -> bool:
    """Whether the host would wait; of indices for masks, whose ones have to be counted."""
    if func.overloadpacket not in _INDEXING:
        return func in _WAITING
    masks = [index for index in args[1] if index is not None and index.dtype in _MASKS]
    is_fill = len(args) > 2 and args[2].dim() == 0  # which asks for no count
    return bool(masks) and not is_fill


class _Kernels:
    """The extension as a module of ``specrt.ops`` sees it: kernels by where tensors lie."""

    def __init__(self, gpu: SimulatedGpu, simt: ModuleType) -> None:
        self._gpu, self._simt = gpu, simt

    def __getattr__(self, name: str) -> Any:
        on_cpu, on_gpu = getattr(_C, name, None), getattr(self._simt, name, None)
        if name == "CudaGraph":
            return on_gpu
        if on_cpu is None or not callable(on_cpu) or isinstance(on_cpu, type):
            return on_cpu

        def kernel(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            held = [self._gpu.holds(tensor) for tensor in tensors]
            if not any(held):  # without tensors: sizes, which may be a GPU's
                return (on_cpu if tensors else on_gpu or on_cpu)(*args, **kwargs)
            assert all(held), f"{name}: tensors of the GPU and of the host"
            assert on_gpu is not None, f"{name}: has no CUDA kernel"
            return on_gpu(*args, **kwargs)

        return kernel


only_simulated = pytest.mark.parametrize("gpu", ["simulated"], indirect=True)
"""A test of what no real GPU tells: how many launches of ours there were."""


@contextmanager
def simulated_gpu(
    simt: ModuleType, monkeypatch: pytest.MonkeyPatch, *, has_linear: bool = False
) -> Iterator[SimulatedGpu]:
    """A simulated GPU for as long as the context lasts.

    Args:
        simt: the shim.
        monkeypatch: undone by the caller's fixture.
        has_linear: whether ``linear`` is the kernel's source, whose ``mma`` are most of a forward
            pass's time; else the CPU's product stands in.
    """
    gpu = SimulatedGpu()
    kernels = _Kernels(gpu, simt)
    for name, module in list(sys.modules.items()):
        if name.startswith("specrt.ops.") and getattr(module, "_C", None) is _C:
            monkeypatch.setattr(module, "_C", kernels)
    monkeypatch.setattr(registry, "is_on_gpu", gpu.holds)

    if not has_linear:
        stand_in(monkeypatch, gpu.holds, partial(call_host, gpu, simt))
    for name in ("tolist", "numpy", "__array__", "__dlpack__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, _guarded(gpu, getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch.Tensor, "to", _staying(gpu, torch.Tensor.to))
    with _Watch(gpu):
        yield gpu


def call_host(gpu: SimulatedGpu, simt: ModuleType, call: Callable[[], None]) -> None:
    """Run what stands in for a kernel, in the order of launches; if they are captured, later."""

    def moving() -> None:
        with gpu.moving():
            call()

    simt.call_host(moving)


def _guarded(gpu: SimulatedGpu, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        is_copied = method.__name__ == "cpu" and gpu.is_moving
        assert is_copied or not gpu.holds(tensor), f"{method.__name__}: of a tensor on the GPU"
        return method(tensor, *args, **kwargs)

    return call


def _staying(gpu: SimulatedGpu, method: Callable[..., Any]) -> Callable[..., Any]:
    """``to``, of a dtype: places are for :class:`Device` to name."""

    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        is_moved = any(isinstance(x, str | torch.device) for x in (*args, *kwargs.values()))
        assert gpu.is_moving or not (is_moved and gpu.holds(tensor)), "to: of a tensor on the GPU"
        return method(tensor, *args, **kwargs)

    return call
