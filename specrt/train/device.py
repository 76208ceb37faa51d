"""Where training runs: whatever a GPU does otherwise than the CPU is asked here.

Memory and copies are :class:`specrt.device.Device`'s. Training is plain torch and needs none of
this package's kernels.
"""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

from specrt.device import CPU, Device

AUTO = "auto"

_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H200 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)
"""Dense bf16 FLOP a second by the makers' data sheets; the first name that fits counts."""
_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 27}
_PASS_TOKENS = {"cpu": 1024, "cuda": 8192}
_HELD_SHARE = 3  # one part in so many of free memory


def parse_place(name: str) -> torch.device | None:
    """A device as users name it, checked to be there.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``: a GPU if there is one.

    Returns:
        The place; None where the launcher is to choose.

    Raises:
        ValueError: another kind of device, or no such GPU.
    """
    if name == AUTO:
        return None
    try:
        place = torch.device(name)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if place.type == "cpu":
        return CPU
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(f"device: expected 'cpu', got {name!r}: torch sees no CUDA GPU")
    if (place.index or 0) >= count:
        known = "only cuda:0 is" if count == 1 else f"cuda:0 .. cuda:{count - 1} are"
        raise ValueError(f"device: {known} there, got {name!r}")
    return place


def has_fast_bf16(*, is_gpu: bool) -> bool:
    """Whether the hardware has bf16 arithmetic."""
    if is_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


class TrainDevice:
    """The place of a run.

    Args:
        memory: of it.
    """

    def __init__(self, memory: Device | None = None) -> None:
        self.memory = memory or Device()
        self.place = self.memory.place

    @classmethod
    def at(cls, place: torch.device) -> TrainDevice:
        """The one at a place as ``accelerate`` names it, which may leave out the GPU's index."""
        if place.type == "cuda":
            index = torch.cuda.current_device() if place.index is None else place.index
            place = torch.device("cuda", index)
        return cls(Device(place))

    @property
    def num_late(self) -> int:
        """Steps that may be under way while the host prepares the next: what a step gave is read so
        many steps later, so that a GPU does not wait for the host."""
        return int(self.memory.is_gpu)

    @property
    def num_logits(self) -> int:
        """Logits that are made at a time: on a CPU they then stay in its caches, and on large
        vocabularies the whole would not fit any memory."""
        return _LOGITS[self.place.type]

    @property
    def pass_tokens(self) -> int:
        """Tokens of a pass through the target: more only leave a CPU's caches, and on a GPU fewer
        would not fill it."""
        return _PASS_TOKENS[self.place.type]

    @property
    def product_peak(self) -> float | None:
        """bf16 FLOP a second of its matrix products, by its data sheet; None where unknown."""
        if self.place.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.place)
        return next((peak for part, peak in _PEAKS if part in name), None)

    @property
    def feature_room(self) -> int:
        """Bytes there that features may take; on the CPU none, where files are mapped instead."""
        return self.memory.free_memory()[0] // _HELD_SHARE if self.place.type == "cuda" else 0

    def peak_memory(self) -> int:
        """Bytes at most allocated on a GPU so far, or resident in this process."""
        if self.place.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.place))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak

    def fused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, as few kernels where there is a compiler for a GPU."""
        return _Fused(function) if self.place.type == "cuda" else function


class _Fused:
    """A function compiled for any number of rows; as it is where that fails, and the log says why.

    Args:
        function: of tensors ``[n, ...]``, which it leaves as they are.
        backend: of ``torch.compile``.
    """

    def __init__(self, function: Callable[..., Any], backend: Any = "inductor") -> None:
        self._function = function
        self._compiled: Callable[..., Any] | None = torch.compile(
            function, fullgraph=True, backend=backend
        )

    def __call__(self, *args: torch.Tensor) -> Any:
        if self._compiled is not None:
            try:
                for tensor in args:  # else every other size would be compiled anew
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
                return self._compiled(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no compiler, or one that is not well: each its own
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self._compiled = None
                logging.getLogger("specrt").warning(
                    "%s is not compiled, which is slower: %s", self._function.__name__, reason
                )
        return self._function(*args)
