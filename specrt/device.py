"""Where a model and its drafter run: memory, the order of work, captured steps, time.

All that differs between the CPU and a GPU outside of kernels is asked here. A GPU works behind the
host: what is launched or uploaded is done later, in order, and nobody waits for it but in
:meth:`Device.read` and :meth:`Device.wait`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from specrt.ops.graph import CpuGraph
from specrt.reuse import Recent

CPU = torch.device("cpu")

Mark = Any
"""A moment in a device's work, as :meth:`Device.mark` gives it."""


class Device:
    """One place where tensors lie and launches run; of one engine, or of several.

    A captured step holds addresses: whoever builds one keeps its buffers alive and at their place,
    and calls :meth:`forget` when they move. On the CPU a step is captured the first time it runs
    (``CpuGraph``) and launched as one call from then on; on a GPU its launches are made anew.

    Args:
        place: the torch device; a GPU's with its index, as tensors there have it.
        is_gpu: whether kernels take tensors there for a GPU's; None: as torch does. (A simulated
            GPU has the CPU's memory.)
        is_eager: whether nothing is captured.
        max_steps: captured ones that are kept; beyond, the one that was not run for longest goes.
    """

    def __init__(
        self,
        place: torch.device = CPU,
        *,
        is_gpu: bool | None = None,
        is_eager: bool = False,
        max_steps: int = 256,
    ) -> None:
        self.place = place
        self.is_gpu = place.type != "cpu" if is_gpu is None else is_gpu
        self.version = 0
        """Grows whenever captured launches have gone stale."""
        self.num_reads = 0
        """Times the host has waited for something to read."""
        self._is_eager = is_eager or self.is_gpu
        self._steps: Recent[Hashable, Callable[[], None]] = Recent(max_steps)

    def __repr__(self) -> str:
        return str(self.place)

    def activation_dtype(self, weights: torch.dtype) -> torch.dtype:
        """Of the rows that ``linear`` multiplies by matrices of dtype ``weights`` there."""
        return weights if self.is_gpu else torch.float32

    # --- memory -------------------------------------------------------------------------------

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of zeros there."""
        return torch.zeros(shape, dtype=dtype, device=self.place)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of any contents there."""
        return torch.empty(shape, dtype=dtype, device=self.place)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies there."""
        return tensor.device == self.place

    def upload(self, host: torch.Tensor, out: torch.Tensor) -> None:
        """Copy a host's tensor to ``out`` there, after what was launched before; nobody waits.

        ``host`` may be written again at once: it is copied into pinned memory, which torch does not
        hand out again before it was read. (From ordinary memory CUDA may read later.)
        """
        if self.place.type == "cuda":
            host = host.pin_memory()
        out.copy_(host, non_blocking=True)

    def there(self, host: torch.Tensor) -> torch.Tensor:
        """A host's tensor there: itself on the CPU (or if it is there), else a copy."""
        if not self.is_gpu or self.holds(host):
            return host
        out = self.empty(*host.shape, dtype=host.dtype)
        self.upload(host, out)
        return out

    def moved(self, host: torch.Tensor) -> torch.Tensor:
        """As :meth:`there`, of weights: once, and too large to be pinned."""
        return host.to(self.place)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the host: itself on the CPU, else a copy, once all before it is done."""
        if not self.is_gpu:
            return tensor
        self.num_reads += 1
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=True)
        self.wait()
        return host

    def glance(self, tensor: torch.Tensor) -> npt.NDArray[np.float32]:
        """A float32 ``tensor`` as far as the host sees it without waiting: itself on the CPU, of a
        GPU's nothing, which is NaN in its shape."""
        if self.is_gpu:
            return np.full(tuple(tensor.shape), np.nan, dtype=np.float32)
        seen: npt.NDArray[np.float32] = tensor.numpy()
        return seen

    def free_memory(self) -> tuple[int, int]:
        """Bytes that are free there, and all there are; ``sys.maxsize`` where nobody can say, as
        on the CPU. What torch keeps of a GPU's for later is given up before."""
        if self.place.type != "cuda":
            return sys.maxsize, sys.maxsize
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.place)

    # --- work ---------------------------------------------------------------------------------

    def run(self, key: Hashable, launch: Callable[[], None]) -> bool:
        """Run ``launch``, which calls nothing but ops on static buffers, by its graph if captured.

        Args:
            key: names the step; the same key must always mean the same launches and buffers. What
                is part of it lives as long as its graph.
            launch: called at least once.

        Returns:
            Whether it had run before, since :meth:`forget` last.
        """
        step = self._steps.get(key)
        if step is None:
            self._steps.put(key, self._first(launch))
            return False
        step()
        return True

    def forget(self) -> None:
        """Captured steps are stale: buffers are about to move.

        Said before they do: an interrupt in between leaves no launches over memory that is gone.
        """
        self.version += 1
        self._steps.clear()

    def wait(self) -> None:
        """Until what was launched is done; on the CPU a launch is done when it returns."""
        if self.place.type == "cuda":
            torch.cuda.current_stream(self.place).synchronize()

    def _first(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Run a step for the first time; what runs it again."""
        if not self._is_eager:
            return CpuGraph.capture(launch).launch
        launch()
        return launch

    # --- time ---------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """This moment: on a GPU that at which all launched so far is done."""
        if self.place.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.place))
        return event

    def ms_between(self, start: Mark, end: Mark) -> float:
        """Milliseconds from one mark to another; on a GPU only behind a read or a wait."""
        if self.place.type != "cuda":
            return 1e3 * float(end - start)
        return float(start.elapsed_time(end))
