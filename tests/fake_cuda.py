"""Time on a GPU that is not there."""

from __future__ import annotations


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
