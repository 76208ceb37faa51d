"""Layouts of ``linear`` on a GPU, for each matrix of three models and each padded number of rows.

Weights rotate, so that they come from memory. All must give the same bits; a layout that a shape
has no room for is left out by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import limits
from bench.gpu import Contender, Device, reason
from bench.gpu_report import Measured
from bench.harness import Row
from bench.linear_cuda import workspace_for
from bench.linear_shapes import GATE_UP, SHAPES, Shape, bytes_of, random_inputs
from bench.variant_table import AGAIN, IN_USE, Tabled, judged
from specrt import ops
from specrt.ops.linear import LinearPlan

PADDED = (8, 64, 16, 32, 128)
"""Numbers of rows that a kernel is compiled for: the rows of plain decoding and of a tree first."""
_MOST_SETS = 8


def name_of(plan: LinearPlan) -> str:
    """As it stands in a result."""
    return f"{plan.tile_rows} rows, {plan.num_stages} stages"


def key_of(row: Row) -> tuple[int, ...]:
    """Outputs and inputs of the matrix, rows."""
    num_outputs, num_inputs = map(int, row["shape"].split("x"))
    return num_outputs, num_inputs, row["rows"]


PLANS = {
    name_of(plan): plan
    for plan in (LinearPlan(tile, stages) for tile in (64, 128) for stages in (3, 4, 6, 8))
}
CHOICES = {name: (plan.tile_rows, plan.num_stages) for name, plan in PLANS.items()}
TABLED = Tabled("linear", "linear_variants", CHOICES, key_of, num_exact=2)


@dataclass(frozen=True)
class Case:
    """So many rows through one matrix."""

    shape: Shape
    rows: int

    def __str__(self) -> str:
        return f"linear {self.shape} rows {self.rows}"


def cases(is_quick: bool, device: Device) -> Iterator[Case]:
    """Plain decoding and trees before others."""
    for rows in PADDED[: 1 if is_quick else None]:
        for shape in SHAPES[: 5 if is_quick else None]:
            yield Case(shape, rows)


class Launches:
    """A product by each of some matrices, into one output.

    Args:
        case: whose shape is as it is on the device.
        device: where.
        num_sets: of weights.
    """

    def __init__(self, case: Case, device: Device, num_sets: int) -> None:
        place, shape = device.place, case.shape
        x, self._weights = random_inputs(shape, place.dtype, place.device, num_sets)
        self._x = x[: case.rows]
        is_gated = shape.matrix == GATE_UP and place.device == "cuda"
        self._gated: dict[str, Any] = {"is_gated": True} if is_gated else {}
        self._workspace = workspace_for([shape], case.rows, device)
        num_outputs = shape.num_outputs // 2 if is_gated else shape.num_outputs
        self.out = place.poison(case.rows, num_outputs)

    def by(self, plan: LinearPlan | None) -> Contender:
        """The launches by a plan; None: by the one in use."""
        asked = {"out": self.out, "workspace": self._workspace, "plan": plan, **self._gated}

        def launch(weight: torch.Tensor) -> Callable[[], object]:
            return lambda: ops.linear(self._x, weight, **asked)

        return Contender([launch(weight) for weight in self._weights])


def one_case(case: Case, device: Device, ceilings: limits.Ceilings, l2_bytes: int) -> Measured:
    """Microseconds of every variant; no row if there is no memory for it."""
    small = Case(case.shape.on(device), case.rows)
    weight_bytes = bytes_of([small.shape], device.place.dtype)
    room = device.free_bytes() // 2
    num_sets = limits.input_sets(weight_bytes, weight_bytes, l2_bytes, room, _MOST_SETS)
    if num_sets == 0:
        return None, {IN_USE: f"needs {weight_bytes / 1e9:.1f} GB"}
    contenders, refused = same_bits(Launches(small, device, num_sets))
    timings = device.measure(contenders)
    work = limits.linear(case.shape.num_outputs, case.shape.num_inputs, case.rows)
    row: Row = {
        "model": case.shape.model,
        "matrix": case.shape.matrix,
        "shape": f"{case.shape.num_outputs}x{case.shape.num_inputs}",
        "rows": case.rows,
        **judged(timings.graph).columns,
        **limits.figures(work, timings.graph[IN_USE], ceilings),
    }
    others = {f"{name}_us": 1e6 * s for name, s in timings.graph.items() if name != IN_USE}
    return row | others, timings.failures | refused


def same_bits(launches: Launches) -> tuple[dict[str, Contender], dict[str, str]]:
    """The variants, when each has given the bits of the one in use; and those refused here.

    Raises:
        AssertionError: one has given others.
    """
    made = {IN_USE: launches.by(None), AGAIN: launches.by(None)}
    made[IN_USE].launches[0]()
    expected, refused = launches.out.clone(), {}
    for name, plan in PLANS.items():
        launches.out.fill_(float("nan"))  # what the one before wrote must not count
        contender = launches.by(plan)
        try:
            contender.launches[0]()
        except ValueError as error:  # no room for so many stages
            refused[name] = reason(error)
            continue
        is_same = launches.out.view(torch.uint8).equal(expected.view(torch.uint8))
        assert is_same, f"{name}: other bits than the one in use"
        made[name] = contender
    return made, refused


def once(case: Case, device: Device) -> None:
    """One launch, for a profiler."""
    Launches(Case(case.shape.on(device), case.rows), device, 1).by(None).run()
