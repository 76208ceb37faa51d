"""Time on a GPU that is not there, and its end."""

from __future__ import annotations

from typing import Any

import pytest

from specrt.models.model import LlamaModel
from specrt.types import VerifyOutput

ILLEGAL_ACCESS = """CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call.
"""
"""As torch says it."""


class FakeEvent:
    """Milliseconds that pass only when a test lets them."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = FakeEvent.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.time - self.time


class FragileGpu:
    """A model's device that fails after some forward passes, for good or once.

    Args:
        model: its ``forward`` and its device's ``wait`` are replaced.
        monkeypatch: puts them back.
        num_good: passes before it fails.
        error: what the pass raises then.
        is_lost: whether all that is asked later fails too, as after an illegal access.
    """

    def __init__(
        self,
        model: LlamaModel,
        monkeypatch: pytest.MonkeyPatch,
        num_good: int,
        error: Exception | None = None,
        *,
        is_lost: bool = True,
    ) -> None:
        self.num_left = num_good
        self._error = error or RuntimeError(ILLEGAL_ACCESS)
        self._stays_lost = is_lost
        self._is_lost = False
        self._forward = model.forward
        monkeypatch.setattr(model, "forward", self._run)
        monkeypatch.setattr(model.device, "wait", self.wait)

    def lose(self) -> None:
        """From now on nothing is answered."""
        self._is_lost = True

    def wait(self) -> None:
        if self._is_lost:
            raise RuntimeError(ILLEGAL_ACCESS)

    def _run(self, *args: Any, **options: Any) -> VerifyOutput:
        self.wait()
        self.num_left -= 1
        if self.num_left == -1:
            self._is_lost = self._stays_lost
            raise self._error
        return self._forward(*args, **options)
