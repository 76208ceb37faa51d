"""Our row-invariant linear against ``torch.nn.functional.linear``.

A pass multiplies every matrix of a model once, as a decode step does, so the weights come from
memory unless the caches hold them all. Ours runs as the engine runs it, as a captured graph;
``eager_ms`` is one Python call a matrix, which is what torch's figure is made of too.

Before any timing every row of 1..128 rows is compared with the row computed alone; one bit of
difference ends the run.

``cost`` is a pass in passes of one row, ``torch_cost`` torch's in its own. ``% triad`` is the
weights' bytes a second by those of STREAM's triad in the same turns, as STREAM counts them (its
stores are ordinary ones: with the lines that are read to be written it moves 4/3 as much).

``--shapes llama-1b`` or ``qwen-0.5b`` is a quarter of that model's layers and of its head's rows, a
part that no cache holds, ``smollm2`` all of them; the embedding is not multiplied by.

``--device cuda`` has the shapes of large models and cuBLAS beside it: ``linear_cuda.py``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench import gpu
from bench.cpu_models import CPU_MODELS
from bench.harness import Row, measure_interleaved, parser, ratio_to, report, start
from bench.stream import Triad
from bench.weight_kinds import KINDS, SMALL_KINDS
from specrt import ops
from specrt.ops.graph import CpuGraph

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_ROWS = ROWS[-1]
TRIAD = "triad"

_H, _I = 512, 1408
_SHARE = {"llama-1b": 4, "qwen-0.5b": 4, "smollm2": 1}
SMALL_SHAPES: dict[str, list[tuple[int, int]]] = {
    # One matrix a layer with about a layer's weights: 86 MB in float32.
    "8x512": [((2 * _H + 3 * _I) // 12 * 12, _H)] * 8,
    # The bundled model's layers: qkv, o, gate_up, down.
    "builtin": [(512, 256), (256, 256), (1408, 256), (256, 704)] * 24,
}
SHAPES = SMALL_SHAPES | {name: model.matrices(_SHARE[name]) for name, model in CPU_MODELS.items()}
"""``(N, K)`` of every matrix of a pass."""


def allocate(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Random matrices behind one another in one allocation, as the loader lays them out."""
    arena = torch.empty(sum(n * k for n, k in shapes), dtype=dtype).normal_(std=0.05)
    sizes = [n * k for n, k in shapes]
    return [part.view(shape) for part, shape in zip(arena.split(sizes), shapes, strict=True)]


class Pass:
    """``num_rows`` rows through every matrix, by us and, of those in rows, by torch."""

    def __init__(
        self,
        matrices: Sequence[ops.Matrix],
        num_rows: int,
        ours: Sequence[ops.Matrix] | None = None,
    ) -> None:
        ours = ours or matrices
        self.num_bytes = sum(matrix.nbytes for matrix in ours)
        self.num_flops = 2 * num_rows * sum(math.prod(matrix.shape) for matrix in ours)
        x = {k: torch.randn(num_rows, k) for k in {matrix.shape[1] for matrix in matrices}}
        out = {n: torch.empty(num_rows, n) for n in {matrix.shape[0] for matrix in matrices}}
        self._scratch = ops.row_scratch(max(x), num_rows)
        theirs = [matrix for matrix in matrices if isinstance(matrix, torch.Tensor)]
        cast = {w.shape[1]: x[w.shape[1]].to(w.dtype) for w in theirs}
        self._calls = [(x[w.shape[1]], w, out[w.shape[0]]) for w in ours]
        self._torch_calls = [(cast[w.shape[1]], w) for w in theirs]
        self.ours: Callable[[], None] = CpuGraph.capture(self.eager).launch

    def eager(self) -> None:
        """Our kernel, one Python call a matrix."""
        for x, weight, out in self._calls:
            ops.linear(x, weight, out=out, workspace=self._scratch)

    def torch(self) -> None:
        """Torch's, with activations of the weights' dtype."""
        for x, weight in self._torch_calls:
            F.linear(x, weight)


def check_rows(matrices: Sequence[ops.Matrix], counts: Iterable[int]) -> None:
    """Compare row i of M rows with row i alone, bit for bit.

    Raises:
        SystemExit: they differ.
    """
    for weight in {tuple(matrix.shape): matrix for matrix in matrices}.values():
        x = torch.randn(MAX_ROWS, weight.shape[1])
        alone = torch.cat([ops.linear(row, weight) for row in x.split(1)])
        for count in counts:
            together = ops.linear(x[:count], weight)
            if not torch.equal(together.view(torch.int32), alone[:count].view(torch.int32)):
                raise SystemExit(
                    f"linear {list(weight.shape)} {type(weight).__name__}: a row of {count} rows "
                    "differs from the same row alone"
                )


@dataclass(frozen=True)
class Bench:
    """What is measured of every kind of every shape."""

    counts: Sequence[int]
    """Rows."""
    checked: Sequence[int]
    """Rows that are compared with a row alone."""
    rounds: int
    triad: Triad

    def rows(self, shape: str, kind: str) -> list[Row]:
        """One line for each number of rows; all of them, torch's and the triad in turn.

        Raises:
            SystemExit: a row depends on the others.
        """
        matrices = allocate(SHAPES[shape], KINDS[kind].dtype)
        ours = [KINDS[kind].of(matrix) for matrix in matrices]
        check_rows(ours, self.checked)
        passes = {count: Pass(matrices, count, ours) for count in self.counts}
        contenders: dict[str, Callable[[], None]] = {TRIAD: self.triad.run}
        for count, one in passes.items():
            contenders |= {f"ours {count}": one.ours, f"torch {count}": one.torch}
            if shape in SMALL_SHAPES:  # elsewhere a call is nothing beside its time
                contenders[f"eager {count}"] = one.eager
        seconds = measure_interleaved(contenders, min_time=0, rounds=self.rounds)
        facts: Row = {"shape": shape, "kind": kind}
        return [facts | self._row(count, one, seconds) for count, one in passes.items()]

    def _row(self, count: int, one: Pass, seconds: Mapping[str, float]) -> Row:
        ours, torchs = seconds[f"ours {count}"], seconds[f"torch {count}"]
        eager = seconds.get(f"eager {count}")
        stream = self.triad.num_bytes / seconds[TRIAD]
        return {
            "rows": count,
            "ms": 1e3 * ours,
            "GB/s": one.num_bytes / ours / 1e9,
            "% triad": 100 * one.num_bytes / ours / stream,
            "GFLOP/s": one.num_flops / ours / 1e9,
            "eager_ms": None if eager is None else 1e3 * eager,
            "torch_ms": 1e3 * torchs,
            "torch/ours": ratio_to(torchs, ours),
            "cost": ours / seconds[f"ours {self.counts[0]}"],
            "torch_cost": torchs / seconds[f"torch {self.counts[0]}"],
            "triad GB/s": stream / 1e9,
        }


def _names(text: str) -> list[str]:
    return text.split(",")


def _parse() -> argparse.Namespace:
    arguments = parser(__doc__)
    gpu.add_arguments(arguments)
    add = arguments.add_argument
    add("--shapes", type=_names, default=list(SMALL_SHAPES), help=f"of {', '.join(SHAPES)}")
    add("--kinds", type=_names, help=f"of {', '.join(KINDS)}; default: all, of small shapes few")
    add("--rows", type=int, nargs="+", help="default: 1 to 128 by doubling")
    add("--rounds", type=int, help="timings of each; default: 30, of a real model's shapes 9")
    args = start(arguments)
    for name, known in (("shapes", SHAPES), ("kinds", KINDS)):
        wrong = set(getattr(args, name) or ()) - set(known)
        if wrong:
            arguments.error(
                f"--{name}: expected some of {', '.join(known)}, got {', '.join(wrong)}"
            )
    return args


def main() -> None:
    """Check, measure and report."""
    args = _parse()
    if args.device == "cuda":
        device = gpu.chosen_device(args)
        from bench import linear_cuda

        linear_cuda.run(args, device)
        return
    counts = args.rows or ((1, 8) if args.quick else ROWS)
    every = (2, 3, 5, 8, 17, MAX_ROWS)
    triad = Triad(1 << 20 if args.quick else None)
    rows = []
    for shape in args.shapes:
        is_small = shape in SMALL_SHAPES
        checked = every if args.quick or not is_small else range(1, MAX_ROWS + 1)
        rounds = args.rounds or (3 if args.quick else 30 if is_small else 9)
        bench = Bench(counts, checked, rounds, triad)
        for kind in args.kinds or (SMALL_KINDS if is_small else KINDS):
            rows += bench.rows(shape, kind)
    name = "linear" if args.shapes == list(SMALL_SHAPES) else f"linear_{'_'.join(args.shapes)}"
    report(name, rows, save=args.save, summary={"rows_bit_equal": True})


if __name__ == "__main__":
    main()
