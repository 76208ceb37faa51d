"""Where a model and its drafter run: memory, the order of work, captured steps, time.

All that differs between the CPU and a GPU outside of kernels is asked here. A GPU works behind the
host: what is launched or uploaded is done later, in order, and nobody waits for it but in
:meth:`Posted.read` and :meth:`Device.wait`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from specrt.ops.graph import CpuGraph, CudaGraph
from specrt.reuse import Recent

CPU = torch.device("cpu")

Mark = Any
"""A moment in a device's work, as :meth:`Device.mark` gives it."""
G = TypeVar("G")

_MOST_STEPS = 256
_MOST_GRAPHS = 128  # on a GPU: each takes memory there, and sizes are few


class Posted:
    """What is on its way to the host.

    Args:
        host: where it arrives.
        wait: until it has arrived; None: it is there.
    """

    def __init__(self, host: torch.Tensor, wait: Callable[[], None] | None = None) -> None:
        self._host, self._wait = host, wait

    def read(self) -> torch.Tensor:
        """It, once it is there; what was launched behind it is not waited for."""
        if self._wait is not None:
            self._wait()
            self._wait = None
        return self._host


@dataclass(frozen=True)
class _Step:
    """What runs a step again."""

    launch: Callable[[], None]
    num_bytes: int = 0
    """Of a GPU's memory."""
    is_final: bool = True
    """Whether it stays so: of a GPU's step that ran once a graph is made when it comes again."""


class Device:
    """One place where tensors lie and launches run; of one engine, or of several.

    A captured step holds addresses: whoever builds one keeps its buffers alive and at their place,
    and calls :meth:`forget` when they move. A captured step is launched as one call. On the CPU it
    is captured as it runs for the first time (``CpuGraph``). On a GPU the first time only runs it,
    which loads its kernels, and the second captures it (``CudaGraph``); where that fails it is
    launched anew each time, and the log says why.

    Args:
        place: the torch device; a GPU's with its index, as tensors there have it.
        is_gpu: whether kernels take tensors there for a GPU's; None: as torch does. (A simulated
            GPU has the CPU's memory.)
        is_eager: whether nothing is captured.
        max_steps: those that are kept; beyond, the one that was not run for longest goes. None:
            256, on a GPU 128.
    """

    def __init__(
        self,
        place: torch.device = CPU,
        *,
        is_gpu: bool | None = None,
        is_eager: bool = False,
        max_steps: int | None = None,
    ) -> None:
        self.place = place
        self.is_gpu = place.type != "cpu" if is_gpu is None else is_gpu
        self.version = 0
        """Grows whenever captured launches have gone stale."""
        self.num_reads = 0
        """Times the host has waited for something to read."""
        self._is_eager = is_eager
        self._is_capturing = False
        self._stream: torch.cuda.Stream | None = None
        self._refusals = set[str]()  # that the log has named
        most = max_steps or (_MOST_GRAPHS if self.is_gpu else _MOST_STEPS)
        self._steps: Recent[Hashable, _Step] = Recent(most)

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

    def post(self, tensor: torch.Tensor) -> Posted:
        """Start a copy of ``tensor`` to the host: itself on the CPU, which may be written again.

        On a GPU it is made behind what was launched so far, into pinned memory that torch hands
        out again once nobody holds it: several may be under way, and a steady loop allocates none.
        """
        if not self.is_gpu:
            return Posted(tensor)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=True)
        return Posted(host, partial(self._await, self.mark()))

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the host: itself on the CPU, else a copy, once all before it is done."""
        return self.post(tensor).read()

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
        if self._is_capturing:  # a part of the step that is
            launch()
            return True
        step = self._steps.get(key)
        if step is None:
            self._steps.put(key, self._first(launch))
            return False
        if not step.is_final:
            step = self._steps.put(key, self._second(launch))
        step.launch()
        return True

    @property
    def graph_bytes(self) -> int:
        """Of a GPU's memory that captured steps take, as far as what is free there tells."""
        return sum(step.num_bytes for step in self._steps.values())

    def forget(self) -> None:
        """Captured steps are stale: buffers are about to move.

        Said before they do: an interrupt in between leaves no launches over memory that is gone.
        One that a GPU still runs ends first, and is freed then.
        """
        self.version += 1
        self._steps.clear()

    def wait(self) -> None:
        """Until what was launched is done; on the CPU a launch is done when it returns."""
        if self.place.type == "cuda":
            torch.cuda.current_stream(self.place).synchronize()

    def working(self) -> AbstractContextManager[None]:
        """Work meanwhile goes to a GPU's stream of its own, in order with what the caller launches
        before and behind on the stream that was current; within another one, nothing."""
        return self._on_own_stream() if self.place.type == "cuda" else nullcontext()

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        caller = torch.cuda.current_stream(self.place)
        own = self._stream = self._stream or torch.cuda.Stream(self.place)
        if caller == own:
            yield
            return
        own.wait_stream(caller)
        try:
            with torch.cuda.stream(own):
                yield
        finally:
            caller.wait_stream(own)

    def _await(self, mark: Mark) -> None:
        self.num_reads += 1
        if self.place.type == "cuda":
            mark.synchronize()

    def _first(self, launch: Callable[[], None]) -> _Step:
        """Run a step for the first time; what runs it again."""
        if self._is_eager or self.is_gpu:
            launch()
            return _Step(launch, is_final=self._is_eager)
        return _Step(self._captured(partial(CpuGraph.capture, launch)).launch)

    def _second(self, launch: Callable[[], None]) -> _Step:
        """A GPU's graph of a step that ran before, or where there can be none its launches."""
        try:
            graph = self._captured(partial(CudaGraph.capture, launch, self.place))
        except RuntimeError as error:
            self._warn(str(error))
            return _Step(launch)
        logging.getLogger("specrt").debug(
            "%s: a graph of %d launches, %d bytes", self, graph.num_launches, graph.num_bytes
        )
        return _Step(graph.launch, graph.num_bytes)

    def _captured(self, capture: Callable[[], G]) -> G:
        """What ``capture`` makes; steps that are run meanwhile are parts of it."""
        try:
            self._is_capturing = True
            return capture()
        finally:
            self._is_capturing = False

    def _warn(self, reason: str) -> None:
        """Once for each reason: steps that have one in common are many."""
        if reason in self._refusals:
            return
        self._refusals.add(reason)
        logging.getLogger("specrt").warning(
            "%s: a step is launched without a graph, which is slower: %s", self, reason
        )

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
