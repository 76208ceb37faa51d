"""A target's steps timed on the GPU: what a pass takes there when it is launched as one graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from specrt.device import Device, Mark


class StepGraphs(Device):
    """A GPU that times each launch of a captured step.

    Args:
        place: the GPU.
    """

    def __init__(self, place: torch.device) -> None:
        super().__init__(place)
        self._passes: list[tuple[Mark, Mark]] = []

    def run(self, key: Hashable, launch: Callable[[], None]) -> bool:
        """As :meth:`Device.run`."""
        start = self.mark()
        is_again = super().run(key, launch)
        if is_again:
            self._passes.append((start, self.mark()))
        return is_again

    def take_seconds(self) -> list[float]:
        """What each launch but steps' first since the last call took on the GPU."""
        self.wait()
        seconds = [self.ms_between(*marks) / 1e3 for marks in self._passes]
        self._passes.clear()
        return seconds
