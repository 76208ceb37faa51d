"""A GPU that answers nothing more: told from errors that pass, and refused from then on.

After some errors of CUDA's (an illegal address, a launch that failed) every later call of the
process fails on that device. Others (no memory, a launch that cannot be started) leave it whole.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from specrt.device import Device


class DeviceWatch:
    """Whether the device that an engine runs on still answers.

    Args:
        device: to wait for it raises if it is lost.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.fault: str | None = None
        """CUDA's words for what broke the device, once something has."""

    def working(self) -> AbstractContextManager[None]:
        """As :meth:`Device.working`, whoever's call it is in; nothing goes to one that is lost."""
        return self._device.working() if self.fault is None else nullcontext()

    def is_lost(self, error: BaseException) -> bool:
        """Whether the device is lost, asked after ``error``; the first one's words are kept.

        Launches fail late and in others' calls, so that whatever was raised may come of it.
        """
        if self.fault is None and isinstance(error, Exception):
            try:
                self._device.wait()
            except RuntimeError as answer:  # as torch raises CUDA's errors
                cause = error if isinstance(error, RuntimeError) else answer
                self.fault = str(cause).partition("\n")[0] or type(cause).__name__
        return self.fault is not None

    def require(self) -> None:
        """Refuse whatever would need the device, if it is lost.

        Raises:
            RuntimeError: so; names the first error.
        """
        if self.fault is not None:
            raise RuntimeError(
                f"engine: its GPU was lost by an earlier error ({self.fault}); a new process can "
                "load again"
            )
