"""What the host says to a drafter's launches, round by round, in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from specrt.device import Device

_ALIGNMENT = 8  # bytes: of int64, the widest there is


class Staging:
    """Static tensors on a device that the host writes, all of them parts of one memory.

    On the CPU host and device see the same memory, and nothing is copied.

    Args:
        device: where they are read.
        fields: shape and dtype of each, by name.
    """

    def __init__(
        self, device: Device, fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        self._device = device
        counts = {name: int(np.prod(shape)) for name, (shape, _) in fields.items()}
        sizes = [counts[name] * dtype.itemsize for name, (_, dtype) in fields.items()]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        starts = [0, *accumulate(padded)]
        self._host = torch.zeros(starts[-1], dtype=torch.uint8)
        self._there = device.there(self._host)

        def parts(memory: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: memory[start : start + size].view(dtype).view(shape)
                for (name, (shape, dtype)), start, size in zip(
                    fields.items(), starts, sizes, strict=False
                )
            }

        self.host: Mapping[str, npt.NDArray[Any]] = {
            name: part.numpy() for name, part in parts(self._host).items()
        }
        """What to write to."""
        self.there: Mapping[str, torch.Tensor] = parts(self._there)
        """What launches read, as :meth:`send` left it."""

    def send(self) -> None:
        """Let later launches see what was written; it may be written again at once."""
        if self._there is not self._host:
            self._device.upload(self._host, self._there)
