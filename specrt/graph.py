"""Recorded steps: a chain of kernel launches captured once and replayed as one call.

On the CPU this is ``CpuGraph``, a list of bound launches run by the extension's thread pool; a CUDA
graph fits behind the same two methods. The models never import this module: they are handed
:meth:`GraphCache.run`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from specrt.ops.graph import CpuGraph


class GraphCache:
    """Captures each step the first time it runs and replays it from then on.

    A graph holds addresses: whoever builds a step keeps its buffers alive and at their place, and
    calls :meth:`clear` when they move.
    """

    def __init__(self, max_graphs: int = 256) -> None:
        self._graphs: OrderedDict[Hashable, CpuGraph] = OrderedDict()
        self._max_graphs = max_graphs

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Run ``launch``, which calls nothing but ops on static buffers, by replay if it is known.

        Args:
            key: names the step; the same key must always mean the same launches and buffers.
            launch: called once, while recording.
        """
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        self._graphs[key] = CpuGraph.capture(launch)
        if len(self._graphs) > self._max_graphs:
            self._graphs.popitem(last=False)

    def clear(self) -> None:
        """Forget all graphs (their buffers have moved)."""
        self._graphs.clear()
