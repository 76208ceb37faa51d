"""Captured steps: a chain of kernel launches taken down once and launched as one call.

On the CPU this is ``CpuGraph``, a list of bound launches run by the extension's thread pool; a CUDA
graph fits behind the same two methods. The models never import this module: they are handed
:meth:`GraphCache.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from specrt.ops.graph import CpuGraph
from specrt.reuse import Recent


class GraphCache:
    """Captures each step the first time it runs and launches its graph from then on.

    A graph holds addresses: whoever builds a step keeps its buffers alive and at their place, and
    calls :meth:`clear` when they move. What is part of a step's key lives as long as its graph.

    Args:
        max_graphs: kept; beyond, the one that was not run for longest goes.
    """

    def __init__(self, max_graphs: int = 256) -> None:
        self._graphs: Recent[Hashable, CpuGraph] = Recent(max_graphs)

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Run ``launch``, which calls nothing but ops on static buffers, by its graph if captured.

        Args:
            key: names the step; the same key must always mean the same launches and buffers.
            launch: called once, to be captured.
        """
        graph = self._graphs.get(key)
        if graph is None:
            self._graphs.put(key, CpuGraph.capture(launch))
        else:
            graph.launch()

    def clear(self) -> None:
        """Forget all graphs (their buffers have moved)."""
        self._graphs.clear()
