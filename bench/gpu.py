"""Timing on a GPU: graphs of many launches, its facts and clocks, and its two ceilings.

Run by itself (``python -m bench.gpu``) it prints the facts of the first GPU as one JSON line; with
``--dry`` those of one that is made up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bench.clocks import clocks as read_clocks
from bench.harness import RESULTS
from bench.limits import MODELS, TARGETS, Ceilings, Model

Launch = Callable[[], object]
OURS = "ours"
_GRAPH_SECONDS = 2e-3
_MOST_LAUNCHES = 400


def add_arguments(parser: argparse.ArgumentParser, *, has_cpu_side: bool = True) -> None:
    """The arguments of a benchmark that runs on a GPU, or can."""
    on_a_gpu = ""
    if has_cpu_side:
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        on_a_gpu = "with --device cuda: "
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"{on_a_gpu}begin no case after so long; those left out are named",
    )
    parser.add_argument(
        "--dry",
        action="store_true",
        help=f"{on_a_gpu}small shapes on the CPU and a made-up clock; no figure is real",
    )


def require_gpu() -> None:
    """Leave with a message unless the kernels can run on a GPU here."""
    from specrt.ops.build import build_info

    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU on this machine (--dry needs none)")
    if build_info().cuda is None:
        raise SystemExit(
            "--device cuda: this build has no CUDA kernels; SPECRT_CUDA=ON make ext builds them"
        )


# --- devices ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the tensors of a benchmark lie, and their type."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def poison(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan"), device=self.device, dtype=self.dtype)

    def ints(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, device=self.device, dtype=torch.int32)


class Device(Protocol):
    """What a benchmark asks of the machine that it measures; :class:`Gpu`, or a made-up one."""

    @property
    def place(self) -> Place: ...

    @property
    def models(self) -> Mapping[str, Model]:
        """Shapes by the names under which they are reported."""

    @property
    def targets(self) -> Mapping[str, Model]:
        """The same, of those whose whole rounds are measured."""

    def facts(self) -> dict[str, Any]: ...
    def clocks(self) -> dict[str, Any]: ...
    def ceilings(self) -> Ceilings: ...

    def free_bytes(self) -> int:
        """Of its memory, after what benchmarks left has been given back."""

    def measure(self, contenders: Mapping[str, Contender]) -> Timings: ...


class Gpu:
    """The first GPU that torch sees."""

    place = Place()
    models: Mapping[str, Model] = MODELS
    targets: Mapping[str, Model] = TARGETS

    def facts(self) -> dict[str, Any]:
        return facts()

    def clocks(self) -> dict[str, Any]:
        return clocks()

    def ceilings(self) -> Ceilings:
        return measure_ceilings()

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def measure(self, contenders: Mapping[str, Contender]) -> Timings:
        return measure(contenders)


def chosen_device(args: argparse.Namespace) -> Device:
    """The GPU or, with ``--dry``, one that is made up.

    Raises:
        SystemExit: the kernels cannot run on a GPU here, or made-up figures would be kept.
    """
    from bench.fake_gpu import FakeGpu

    if not args.dry:
        require_gpu()
        return Gpu()
    if args.save and args.save.resolve() == RESULTS.resolve():
        raise SystemExit("--dry: no figure of it is real, so none is kept in bench/results")
    return FakeGpu()


# --- facts ------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """Name, size, driver and clocks of the first GPU, as they are; nothing is ever set."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "num_sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        **clocks(),
    }


def clocks() -> dict[str, Any]:
    """Clocks, power and temperature now."""
    return read_clocks(f"GPU-{torch.cuda.get_device_properties(0).uuid}")


def measure_ceilings() -> Ceilings:
    """A copy within the device (bytes read and written) and a bf16 product of random matrices."""
    return Ceilings(_copy_rate(), _product_rate())


def _copy_rate() -> float:
    source = torch.randn(min(1 << 28, torch.cuda.mem_get_info()[0] // 32), device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source))


def _product_rate(size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median(lambda: torch.mm(a, b, out=out))


def _median(launch: Launch) -> float:
    for _ in range(3):
        launch()
    return statistics.median(_elapsed(launch) for _ in range(20))


# --- timing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One way to do a piece of work, as one launch for each set of inputs."""

    launches: Sequence[Launch]
    reset: Launch | None = None
    """Before each pass over the sets, where launches move on from what the last one left."""

    def run(self) -> None:
        """One pass."""
        if self.reset:
            self.reset()
        for launch in self.launches:
            launch()


@dataclass(frozen=True)
class Timings:
    """Seconds of one launch by contender."""

    graph: dict[str, float]
    """In a replayed graph: what the GPU takes."""
    eager: dict[str, float]
    """Called from Python one by one: what a caller without graphs waits for."""
    failures: dict[str, str]
    """Contenders that could not run here, with the reason."""


def measure(
    contenders: Mapping[str, Contender], *, min_time: float = 0.02, rounds: int = 7
) -> Timings:
    """Median seconds of a launch of each contender, timed in turn (A B A B ...).

    Each turn replays a graph of some hundred launches that go round the sets of inputs, between
    two events; so the launch from the host does not show, and the gap between two kernels does.

    Args:
        contenders: by name. If ``OURS`` fails, so does this; others are left out.
        min_time: seconds of timed work for each, at the least.
        rounds: replays of each, at the least.
    """
    eager: dict[str, float] = {}
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    failures: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            seconds = _eager_seconds(contender)
            graphs[name] = _capture(contender, passes_for(len(contender.launches), seconds))
            eager[name] = seconds
        except Exception as error:
            if name == OURS:
                raise
            failures[name] = reason(error)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    while any(len(times) < rounds or sum(times) < min_time for times in samples.values()):
        for name, (graph, _) in graphs.items():
            samples[name].append(_elapsed(graph.replay))
    medians = {name: statistics.median(times) / graphs[name][1] for name, times in samples.items()}
    return Timings(medians, eager, failures)


def passes_for(num_launches: int, seconds: float) -> int:
    """Passes over the sets in one graph: some milliseconds of work, not too many launches."""
    wanted = min(_MOST_LAUNCHES, _GRAPH_SECONDS / max(seconds, 1e-9))
    return max(1, round(wanted / num_launches))


def reason(error: BaseException) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def counted(missing: Mapping[str, Sequence[str]], num_rows: int) -> dict[str, str]:
    """Reasons with the cases they left out: their names, or how many if no row has a figure."""
    return {
        reason: f"all {len(cases)}" if len(cases) == num_rows else "; ".join(cases)
        for reason, cases in missing.items()
    }


def _elapsed(run: Launch) -> float:
    """Seconds on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _eager_seconds(contender: Contender) -> float:
    """Also the warm-up: the first pass compiles and loads what the contender needs."""
    contender.run()
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        contender.run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / len(contender.launches)


def _capture(contender: Contender, passes: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """The graph and its launches; replayed once, which uploads it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        contender.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            contender.run()
    graph.replay()
    torch.cuda.synchronize()
    return graph, passes * len(contender.launches)


def main() -> None:
    """Print the facts; nothing known where there is no GPU."""
    from bench.fake_gpu import FakeGpu

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="of a made-up GPU")
    is_dry = parser.parse_args().dry
    found = FakeGpu().facts() if is_dry else facts() if torch.cuda.is_available() else {}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
