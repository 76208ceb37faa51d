"""Capture of launches: of a GPU's as a CUDA graph, of the CPU's as its twin."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specrt import _C


class CpuGraph:
    """Launches captured once, run again with the buffers' present contents."""

    def __init__(self, graph: _C.CpuGraph) -> None:
        self.launch: Callable[[], None] = graph.replay
        """Run all launches in order, on ``torch.get_num_threads()`` threads."""
        self._graph = graph

    @classmethod
    def capture(cls, launch: Callable[[], None]) -> CpuGraph:
        """Run ``launch`` and capture what it launched. An exception leaves nothing captured."""
        graph = _C.CpuGraph()
        try:
            graph.begin()  # within: Ctrl-C may come right behind it
            launch()
        except BaseException:
            with suppress(ValueError):  # it may not have begun
                graph.end()
            raise
        graph.end()
        return cls(graph)

    @property
    def num_launches(self) -> int:
        """How many kernels one launch runs."""
        return int(self._graph.num_launches)


class CudaGraph:
    """A GPU's launches captured once, run again with the buffers' present contents.

    It holds addresses: the caller keeps the buffers alive and at their place. One that is dropped
    while the GPU runs it ends first.
    """

    def __init__(self, graph: _C.CudaGraph) -> None:
        self.launch: Callable[[], None] = graph.replay
        """Start all launches, in order, on torch's current stream of their GPU."""
        self.num_launches: int = graph.num_launches
        """How many kernels one launch runs."""
        self.num_bytes: int = graph.num_bytes
        """Of the GPU's memory that it takes, as far as what is free there tells."""

    @classmethod
    def capture(cls, launch: Callable[[], None], place: torch.device) -> CudaGraph:
        """Capture what ``launch`` launches on the GPU ``place``, and run none of it.

        Launches of other threads go where they always do. An exception leaves nothing captured.

        Raises:
            RuntimeError: there can be no such graph: torch's ops or launches for another device
                would be missing in it, a call in between ended the capture, or CUDA has no memory
                for it (in CUDA's words), or this build no kernels.
        """

        def launched() -> None:
            with _LaunchesAlone():  # type: ignore[no-untyped-call]
                launch()

        with _uncollected():
            return cls(_C.CudaGraph(launched, place.index or 0))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Nothing is collected meanwhile: what is freed may be CUDA's, which would end the capture."""
    was_enabled = gc.isenabled()
    try:
        gc.disable()  # within: Ctrl-C may come right behind it
        yield
    finally:
        if was_enabled:
            gc.enable()


class _LaunchesAlone(TorchDispatchMode):
    """Refuses torch's ops, but views: they would run once, and be missing in the graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            raise RuntimeError(f"a graph holds none of torch's ops, and {func} was called")
        return func(*args, **(kwargs or {}))
