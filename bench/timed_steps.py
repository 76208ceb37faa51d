"""Devices that time each captured step on the GPU, and one that captures as torch does."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from specrt.device import Device


class TimedSteps(Device):
    """A device whose every launch of a captured step is marked before and behind.

    Args:
        place: the torch device.
        options: as of :class:`Device`.
    """

    def __init__(self, place: torch.device, **options: Any) -> None:
        super().__init__(place, **options)
        self._marks: list[tuple[Any, Any]] = []
        self._is_inside = False

    def run(self, key: Hashable, launch: Callable[[], None]) -> bool:
        """As :meth:`Device.run`; what runs for the first time, or within a step, is not counted."""
        if self._is_inside:
            return self._run(key, launch)
        self._is_inside, start = True, self.mark()
        try:
            has_run = self._run(key, launch)
        finally:
            self._is_inside = False
        if has_run:
            self._marks.append((start, self.mark()))
        return has_run

    def _run(self, key: Hashable, launch: Callable[[], None]) -> bool:
        return super().run(key, launch)

    @property
    def num_timed(self) -> int:
        """Steps since the last :meth:`take_seconds`; nobody waits."""
        return len(self._marks)

    def take_seconds(self) -> list[float]:
        """What each step since the last call took there."""
        self.wait()
        marks, self._marks = self._marks, []
        return [self.ms_between(start, end) / 1e3 for start, end in marks]


class TorchGraphs(TimedSteps):
    """The same, with graphs of torch's: libraries allocate while they are captured.

    The first time a step comes it is run, which loads its kernels; the second time it is captured.
    """

    def __init__(self, place: torch.device) -> None:
        super().__init__(place, is_eager=True)
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._depth = 0

    def _run(self, key: Hashable, launch: Callable[[], None]) -> bool:
        if self.place.type != "cuda":
            return super()._run(key, launch)
        if self._depth:  # part of the step that is being run or captured
            launch()
            return True
        self._depth += 1
        try:
            return self._run_outermost(key, launch)
        finally:
            self._depth -= 1

    def _run_outermost(self, key: Hashable, launch: Callable[[], None]) -> bool:
        if key not in self._graphs:
            self._graphs[key] = None
            launch()
            return False
        graph = self._graphs[key]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch()
            self._graphs[key] = graph
        graph.replay()
        return True

    def forget(self) -> None:
        """Forget all graphs: memory has moved."""
        self.wait()  # the last launch may still run
        super().forget()
        self._graphs.clear()
