"""A target's steps as CUDA graphs, for measuring: a pass's time on the GPU, and without launches.

The engine does not use it; steps on a GPU run eagerly there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from specrt.device import Device


class StepGraphs(Device):
    """A GPU that captures a step the second time it comes.

    The first time runs it eagerly, which loads its kernels and makes what cuBLAS keeps. Each launch
    of a graph is timed by events.

    Args:
        place: the GPU.
    """

    def __init__(self, place: torch.device) -> None:
        super().__init__(place)
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._replays: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def run(self, key: Hashable, launch: Callable[[], None]) -> bool:
        """As :meth:`Device.run`."""
        if key not in self._graphs:
            self._graphs[key] = None
            launch()
            return False
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        self._replays.append((start, end))
        return True

    def forget(self) -> None:
        """Forget all graphs: memory has moved."""
        self.wait()  # the last launch may still run
        super().forget()
        self._graphs.clear()

    def take_seconds(self) -> list[float]:
        """What each replay since the last call took on the GPU."""
        torch.cuda.synchronize()
        seconds = [start.elapsed_time(end) / 1e3 for start, end in self._replays]
        self._replays.clear()
        return seconds
