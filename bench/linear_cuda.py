"""Our row-invariant ``linear`` on a GPU against cuBLAS, over the matrices of three models.

``cublas`` is cuBLAS at the true number of rows, with its default workspace: the fastest path whose
rows depend on how many there are. ``cublas 128`` is cuBLAS on 128 rows with float32 sums, copies in
and out: how rows could be invariant without a kernel of ours. All in replayed graphs, in turn, over
weights that rotate, so that they come from memory. ``% of copy``: at which rate weights are read,
as a share of a copy's within the device in the same run.

A ``layer`` is the four products of one in a row; ``x one row`` is its time over that of one row.
``gate_up`` is gated, as a target runs it on a GPU: ``silu(gate) * up`` is in our time alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bench import gpu, limits
from bench.gpu import OURS, Contender, Device
from bench.gpu_report import Measured, run_bench
from bench.harness import Row, ratio_to
from bench.library_linear import product
from bench.linear_shapes import GATE_UP, MOST_ROWS, SHAPES, Shape, bytes_of, layer_shapes
from specrt import ops

ROWS = (60, 1, 8, 16, 32, 64, 128)
PROMPT_ROWS = (512, 2048)
LAYER = "layer"
LIBRARY, LIBRARY_128, ONE_ROW = "cublas", "cublas 128", "one row"
_MOST_SETS = 8
_TOLERANCE = 0.02
"""Of the largest result: a 16-bit rounding of each, and of sums in another order."""


@dataclass(frozen=True)
class Case:
    """Some rows through one matrix, or through those of a layer."""

    model: str
    matrix: str
    shapes: Sequence[Shape]
    rows: int

    def __str__(self) -> str:
        return f"{self.model} {self.matrix} rows {self.rows}"


def cases(is_quick: bool) -> Iterator[Case]:
    """What the goals are about comes first."""
    models = list(dict.fromkeys(shape.model for shape in SHAPES))
    for rows in (60,) if is_quick else (60, 1):
        for model in models[: 1 if is_quick else None]:
            yield Case(model, LAYER, layer_shapes(model), rows)
    of_prompts = PROMPT_ROWS[:1] if is_quick else PROMPT_ROWS
    for rows in (*(ROWS[:2] if is_quick else ROWS), *of_prompts):
        for shape in SHAPES[: 5 if is_quick else None]:
            if rows <= MOST_ROWS or shape.matrix != "head":  # of a prompt it has one row
                yield Case(shape.model, shape.matrix, [shape], rows)


class Product:
    """``rows`` rows through one matrix, by each of the ways.

    Args:
        shape: of the matrix.
        rows: of the input.
        device: where.
        workspace: of ours, which launches share one after another; None without a GPU.
    """

    def __init__(
        self, shape: Shape, rows: int, device: Device, workspace: torch.Tensor | None
    ) -> None:
        place = device.place
        self._x = place.randn(rows, shape.num_inputs)
        self._weight = place.randn(shape.num_outputs, shape.num_inputs) * shape.num_inputs**-0.5
        self._is_gated = shape.matrix == GATE_UP and place.device == "cuda"
        self._workspace = workspace
        num_outputs = shape.num_outputs // 2 if self._is_gated else shape.num_outputs
        self.out = place.poison(rows, num_outputs)
        self.library_out = place.poison(rows, shape.num_outputs)
        # Of cuBLAS on 128 rows.
        self._padded = place.randn(MOST_ROWS, shape.num_inputs)
        self._sums = torch.empty(MOST_ROWS, shape.num_outputs, device=place.device)

    def ours(self) -> None:
        gated = {"is_gated": True} if self._is_gated else {}
        ops.linear(self._x, self._weight, out=self.out, workspace=self._workspace, **gated)

    def library(self) -> None:
        product(self._x, self._weight, self.library_out)

    def library_on_128(self) -> None:
        count = len(self._x)
        self._padded[:count].copy_(self._x)
        product(self._padded, self._weight, self._sums)
        self.library_out.copy_(self._sums[:count])

    def check(self) -> None:
        """Ours and the library's are one product.

        Raises:
            AssertionError: they are not.
        """
        self.ours()
        self.library()
        ours, expected = self.out.float(), self.library_out.float()
        if self._is_gated:
            gate, up = expected.view(len(expected), -1, 2, 8).unbind(2)
            expected = (gate.sigmoid() * gate * up).reshape(ours.shape)
        wrong = float((ours - expected).abs().max() / expected.abs().max())
        assert wrong <= _TOLERANCE, f"{OURS}: differs from {LIBRARY} by {wrong:.2g} of the largest"


def workspace_for(shapes: Sequence[Shape], rows: int, device: Device) -> torch.Tensor | None:
    """One that is enough for each; the CPU wants none."""
    if device.place.device != "cuda":
        return None
    sizes = (ops.linear_workspace(s.num_outputs, s.num_inputs, rows) for s in shapes)
    return torch.zeros(max(sizes), device=device.place.device)


def one_case(case: Case, device: Device, ceilings: limits.Ceilings, l2_bytes: int) -> Measured:
    """Results first; no row if there is no memory for it."""
    shapes = [shape.on(device) for shape in case.shapes]
    weight_bytes = bytes_of(shapes, device.place.dtype)
    held = 2 * weight_bytes + 4 * case.rows * sum(s.num_outputs + s.num_inputs for s in shapes) * 4
    room = device.free_bytes() // 2
    num_sets = limits.input_sets(weight_bytes, held, l2_bytes, room, _MOST_SETS)
    if num_sets < 1:
        return None, {OURS: f"needs {held / 1e9:.1f} GB"}
    workspace = workspace_for(shapes, max(case.rows, 1), device)

    def sets(rows: int) -> list[list[Product]]:
        return [[Product(s, rows, device, workspace) for s in shapes] for _ in range(num_sets)]

    made = sets(case.rows)
    for one in made[0]:
        one.check()
    alone = sets(1) if case.matrix == LAYER and case.rows > 1 else None
    timings = device.measure(contenders(case, made, alone))
    return row_of(case, weight_bytes, timings, ceilings) | {"sets": num_sets}, timings.failures


def contenders(
    case: Case, sets: Sequence[Sequence[Product]], alone: Sequence[Sequence[Product]] | None
) -> dict[str, Contender]:
    """Ways to do it; a launch is all of the case's products.

    Args:
        case: which.
        sets: of inputs.
        alone: the same of one row, to compare with.
    """

    def each(way: str, made: Sequence[Sequence[Product]]) -> Contender:
        def all_of(products: Sequence[Product]) -> None:
            for one in products:
                getattr(one, way)()

        return Contender([lambda products=products: all_of(products) for products in made])  # type: ignore[misc]

    found = {OURS: each("ours", sets), LIBRARY: each("library", sets)}
    if case.rows <= MOST_ROWS:
        found[LIBRARY_128] = each("library_on_128", sets)
    if alone:
        found[ONE_ROW] = each("ours", alone)
    return found


def row_of(case: Case, weight_bytes: int, timings: gpu.Timings, ceilings: limits.Ceilings) -> Row:
    """Columns of a case."""
    ours = timings.graph[OURS]

    def us(name: str) -> float | None:
        return 1e6 * timings.graph[name] if name in timings.graph else None

    def to_ours(name: str) -> float | None:
        return ratio_to(timings.graph[name], ours) if name in timings.graph else None

    work = sum(2 * case.rows * shape.num_weights for shape in case.shapes)
    one_row = timings.graph.get(ONE_ROW)
    return {
        "model": case.model,
        "matrix": case.matrix,
        "rows": case.rows,
        "MB": sum(shape.num_weights for shape in case.shapes) * limits.BF16 / 1e6,
        "us": 1e6 * ours,
        "GB/s": weight_bytes / ours / 1e9,
        "TFLOP/s": work / ours / 1e12,
        "% of copy": 100 * weight_bytes / ours / ceilings.bytes_per_s,
        "cublas_us": us(LIBRARY),
        "cublas/ours": to_ours(LIBRARY),
        "cublas_128_us": us(LIBRARY_128),
        "cublas 128/ours": to_ours(LIBRARY_128),
        "x one row": None if one_row is None else ours / one_row,
        "eager_us": 1e6 * timings.eager[OURS],
    }


def run(args: argparse.Namespace, device: Device) -> None:
    """Measure and report what the budget allows."""
    torch.manual_seed(0)
    run_bench("linear_cuda", cases(args.quick), one_case, args, device)
