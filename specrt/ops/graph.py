"""Capture of launches on the CPU, the twin of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

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
