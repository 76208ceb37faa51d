"""Our row-invariant linear against ``torch.nn.functional.linear``.

A pass multiplies every matrix of a model once, as a decode step does, so the weights come from
memory unless the caches hold them all. Ours runs as the engine runs it, as a captured graph;
``eager_ms`` is one Python call a matrix, which is what torch's figure is made of too.

Before any timing every row of 1..128 rows is compared with the row computed alone; one bit of
difference ends the run.

``--device cuda`` has the shapes of large models and cuBLAS beside it: ``linear_cuda.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F

from bench import gpu
from bench.harness import Row, measure_interleaved, parser, ratio_to, report, start
from specrt import ops
from specrt.device import Device
from specrt.models.float8 import float8_matrix
from specrt.ops.graph import CpuGraph

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_ROWS = ROWS[-1]
FLOAT8 = "float8"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, FLOAT8: torch.bfloat16}
"""Of torch's matrices, which has no product by float8 on a CPU; of ours too, but for that one."""

_H, _I = 512, 1408
SHAPES: dict[str, list[tuple[int, int]]] = {
    # One matrix a layer with about a layer's weights: 86 MB in float32.
    "8 x 512": [((2 * _H + 3 * _I) // 12 * 12, _H)] * 8,
    # The bundled model's layers: qkv, o, gate_up, down.
    "builtin": [(512, 256), (256, 256), (1408, 256), (256, 704)] * 24,
}
"""``(N, K)`` of every matrix of a pass."""


def allocate(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Random matrices behind one another in one allocation, as the loader lays them out."""
    arena = torch.empty(sum(n * k for n, k in shapes), dtype=dtype).normal_(std=0.05)
    sizes = [n * k for n, k in shapes]
    return [part.view(shape) for part, shape in zip(arena.split(sizes), shapes, strict=True)]


class Pass:
    """``num_rows`` rows through every matrix, by us and by torch."""

    def __init__(
        self,
        matrices: Sequence[torch.Tensor],
        num_rows: int,
        ours: Sequence[ops.Matrix] | None = None,
    ) -> None:
        ours = ours or matrices
        self.num_bytes = sum(matrix.nbytes for matrix in ours)
        self.num_flops = 2 * num_rows * sum(math.prod(matrix.shape) for matrix in ours)
        x = {k: torch.randn(num_rows, k) for k in {matrix.shape[1] for matrix in matrices}}
        out = {n: torch.empty(num_rows, n) for n in {matrix.shape[0] for matrix in matrices}}
        cast = {k: value.to(matrices[0].dtype) for k, value in x.items()}
        self._calls = [(x[w.shape[1]], w, out[w.shape[0]]) for w in ours]
        self._torch_calls = [(cast[w.shape[1]], w) for w in matrices]
        self.ours: Callable[[], None] = CpuGraph.capture(self.eager).launch

    def eager(self) -> None:
        """Our kernel, one Python call a matrix."""
        for x, weight, out in self._calls:
            ops.linear(x, weight, out=out)

    def torch(self) -> None:
        """Torch's, with activations of the weights' dtype."""
        for x, weight in self._torch_calls:
            F.linear(x, weight)


def check_rows(matrices: Sequence[torch.Tensor], counts: Iterable[int]) -> None:
    """Compare row i of M rows with row i alone, bit for bit.

    Raises:
        SystemExit: they differ.
    """
    for weight in {matrix.shape: matrix for matrix in matrices}.values():
        x = torch.randn(MAX_ROWS, weight.shape[1])
        alone = torch.cat([ops.linear(row, weight) for row in x.split(1)])
        for count in counts:
            together = ops.linear(x[:count], weight)
            if not torch.equal(together.view(torch.int32), alone[:count].view(torch.int32)):
                raise SystemExit(
                    f"linear {list(weight.shape)} {weight.dtype}: a row of {count} rows differs "
                    "from the same row alone"
                )


def bench(shape: str, dtype: str, counts: Sequence[int], rounds: int) -> list[Row]:
    """One line for each number of rows; all of them and torch's are timed in turn."""
    matrices = allocate(SHAPES[shape], DTYPES[dtype])
    ours = [float8_matrix(one, Device()) for one in matrices] if dtype == FLOAT8 else None
    passes = {count: Pass(matrices, count, ours) for count in counts}
    contenders: dict[str, Callable[[], None]] = {}
    for count, one in passes.items():
        contenders |= {
            f"ours {count}": one.ours,
            f"eager {count}": one.eager,
            f"torch {count}": one.torch,
        }
    seconds = measure_interleaved(contenders, min_time=0, rounds=rounds)
    rows = []
    for count, one in passes.items():
        ours, torchs = seconds[f"ours {count}"], seconds[f"torch {count}"]
        rows.append(
            {
                "shape": shape,
                "dtype": dtype,
                "rows": count,
                "ms": 1e3 * ours,
                "GB/s": one.num_bytes / ours / 1e9,
                "GFLOP/s": one.num_flops / ours / 1e9,
                "eager_ms": 1e3 * seconds[f"eager {count}"],
                "torch_ms": 1e3 * torchs,
                "torch/ours": ratio_to(torchs, ours),
                "cost": ours / seconds[f"ours {counts[0]}"],
                "torch_cost": torchs / seconds[f"torch {counts[0]}"],
            }
        )
    return rows


def main() -> None:
    """Check, measure and report."""
    arguments = parser(__doc__)
    gpu.add_arguments(arguments)
    args = start(arguments)
    if args.device == "cuda":
        device = gpu.chosen_device(args)
        from bench import linear_cuda

        linear_cuda.run(args, device)
        return
    counts = (1, 8) if args.quick else ROWS
    checked = (2, 3, 5, 8, 17, MAX_ROWS) if args.quick else range(1, MAX_ROWS + 1)
    rows = []
    for shape, sizes in SHAPES.items():
        for dtype in DTYPES:
            check_rows(allocate(sizes, DTYPES[dtype]), checked)
            rows += bench(shape, dtype, counts, 3 if args.quick else 30)
    report("linear", rows, save=args.save, summary={"rows_bit_equal": True})


if __name__ == "__main__":
    main()
