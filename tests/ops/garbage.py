"""Kernels against tensors that hold garbage: nothing outside of the tensors given may be touched.

    python -m tests.ops.garbage [KERNEL...] [--cpu N] [--simt N] [--seed S] [--first I]

Each kernel has a process of its own, so that a crash is an outcome, and call I of a seed is always
the same. Between calls of the CPU's kernels only contents change: the launches are captured once,
as an engine does. Their tensors end, or begin, at a page that faults; the shim guards its own.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import mmap
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from specrt.ops.graph import CpuGraph
from tests.ops.conftest import Backend, use_simt
from tests.ops.garbage_calls import KERNELS, PLANTED
from tests.ops.garbage_kernel import NUM_VARIANTS, Arguments, Kernel

CPU = torch.device("cpu")
POOL = 1 << 16
SECONDS = 250
"""After which a process is taken to hang."""

EDGES = [-(2**31), -(2**31) + 1, -(2**30), -65536, -64, -2, -1, 0, 1, 63, 64, 127, 128, 255, 65536]
EDGES += [2**20, 2**30, 2**31 - 257, 2**31 - 2, 2**31 - 1]
FLOATS = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, -1e38]


# --- garbage


class Garbage:
    """Stretches of values that make no sense; with ``is_far`` none is a number of anything."""

    def __init__(self, seed: int, *, is_far: bool = False) -> None:
        rng = np.random.default_rng(seed)
        far = rng.choice([x for x in EDGES if x < 0 or x >= 2**20], POOL)
        near = rng.choice(np.concatenate([EDGES, np.arange(-8, 30)]), POOL)
        wide = rng.integers(-(2**63), 2**63, POOL)
        is_wide = rng.random(POOL) < 0.3
        ints = far if is_far else np.where(is_wide, wide.astype(np.int32), near)
        floats = np.where(is_wide, rng.choice(FLOATS, POOL), rng.standard_normal(POOL))
        self._pools = {
            np.dtype(np.int32): ints.astype(np.int32),
            np.dtype(np.int64): far if is_far else np.where(is_wide, wide, near),
            np.dtype(np.float32): floats.astype(np.float32),
            np.dtype(np.float64): floats,
        }
        self._levels = rng.random(POOL)

    def spoil(self, array: np.ndarray, rng: random.Random) -> None:
        """Replace nothing, a tenth, a half or all of an array."""
        flat, density = array.reshape(-1), rng.choice((0.0, 0.1, 0.5, 1.0))
        starts = [rng.randrange(POOL - flat.size) for _ in range(2)]
        values, levels = (
            pool[start : start + flat.size]
            for pool, start in zip((self._pools[array.dtype], self._levels), starts, strict=True)
        )
        np.copyto(flat, values, where=levels < density)


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A contiguous copy that ends, or begins, at a page that faults, as does its other side's."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    paged = -(-size // page) * page
    room = mmap.mmap(-1, paged + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for edge in (address, address + page + paged):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0):
            raise OSError("mprotect failed")
    start = page + (paged - size if at_end else 0)
    copy = torch.frombuffer(room, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copy.view(tensor.shape).copy_(tensor)


@dataclass(frozen=True)
class Call:
    """A call whose contents can be spoiled and put right again."""

    run: Callable[[], object]
    arguments: Arguments
    """Kept, as a captured launch knows addresses alone."""
    contents: list[tuple[np.ndarray, np.ndarray]]
    """Those of each tensor that may be spoiled, and what they are when they are right."""

    @classmethod
    def of(cls, kernel: Kernel, variant: int, backend: Backend, at_end: bool) -> Call:
        arguments: Arguments = kernel.make(variant, backend)
        if not backend.runs_cuda_source:
            for name, value in arguments.items():
                if isinstance(value, torch.Tensor):
                    arguments[name] = guarded(value, at_end)
        names = [n for n in (*kernel.own, *kernel.shared) if arguments.get(n) is not None]
        arrays = [arguments[name].numpy() for name in names]
        contents = [(array, array.copy()) for array in arrays]

        def launch() -> None:
            kernel.call(arguments)

        if backend.runs_cuda_source:
            return cls(launch, arguments, contents)
        graph = CpuGraph.capture(launch)
        return cls(graph.launch if graph.num_launches else launch, arguments, contents)

    def spoil(self, garbage: Garbage, rng: random.Random) -> None:
        for array, right in self.contents:
            np.copyto(array, right)
            garbage.spoil(array, rng)


# --- processes


class Progress:
    """A number that outlives the process that wrote it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def set(self, number: int) -> None:
        self._memory[:] = number.to_bytes(8, "little")

    def get(self) -> int:
        return int.from_bytes(self._memory[:], "little")


def kernel_of(name: str) -> Kernel:
    return PLANTED if name == "planted" else KERNELS[name]


def attack(name: str, backend: str, seed: int, indices: Iterable[int], at: Progress) -> None:
    """Call a kernel with garbage, of ``seed``, time and again."""
    torch.set_num_threads(1)
    simt = use_simt(0) if backend == "simt" else None
    garbage, kernel = Garbage(seed), kernel_of(name)
    place = Backend(backend, CPU)
    calls = [Call.of(kernel, i, place, end) for end in (True, False) for i in range(NUM_VARIANTS)]
    for index in indices:
        at.set(index)
        call = calls[index % len(calls)]
        call.spoil(garbage, random.Random(f"{seed} {index}"))
        if simt is not None:
            simt.set_schedule(index % 8)
        call.run()


def in_a_process(work: Callable[[Progress], None]) -> str:
    """Fork and run; how it ended, ``ok`` or where it died."""
    at, pid = Progress(), os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        status = 1
        try:
            work(at)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    how = signal.Signals(-code).name if code < 0 else "an exception"
    return "ok" if code == 0 else f"{how} in call {at.get()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", default=list(KERNELS), help=", ".join(KERNELS))
    parser.add_argument("--cpu", type=int, default=0, help="calls of each kernel of the CPU")
    parser.add_argument("--simt", type=int, default=0, help="calls of each kernel under the shim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    args = parser.parse_args()
    faulthandler.enable()
    for backend, count in (("cpu", args.cpu), ("simt", args.simt)):
        indices = range(args.first, args.first + count)
        for name in args.kernels:
            if count == 0 or (backend == "simt" and not kernel_of(name).has_cuda_source):
                continue
            work = partial(attack, name, backend, args.seed, indices)
            print(f"{name}[{backend}]: {in_a_process(work)}", flush=True)


if __name__ == "__main__":
    main()
