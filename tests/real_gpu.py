"""A GPU that is there, on which nobody may wait but who may: CUDA's word for what
:mod:`tests.simulated_gpu` finds without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from specrt.device import Device


class RealGpu(Device):
    """GPU 0; torch refuses to wait for it outside of :meth:`wait` and :meth:`moved`. (What was
    posted is waited for by an event, which torch lets pass.)"""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", 0))
        self.is_strict = True
        """As of :class:`~tests.simulated_gpu.SimulatedGpu`."""

    def _warn(self, reason: str) -> None:
        assert not self.is_strict, f"a step cannot be captured: {reason}"

    def moved(self, host: torch.Tensor) -> torch.Tensor:
        with self.moving():
            return super().moved(host)

    def wait(self) -> None:
        with self.moving():
            super().wait()

    @contextmanager
    def moving(self) -> Iterator[None]:
        """What is done meanwhile may wait."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextmanager
def real_gpu() -> Iterator[RealGpu]:
    """It, for as long as the context lasts."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield RealGpu()
    finally:
        torch.cuda.set_sync_debug_mode("default")
