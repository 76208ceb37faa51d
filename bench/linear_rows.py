"""Are the rows of ``linear`` independent of one another on this GPU, by whatever layout?

Every matrix of three models, in both 16-bit types. A row's bits must be the same at each of the 128
places, with every number of rows, and alone; by the layout in use and by each that could be asked
for: 128 cyclic shifts of 128 rows bring each row to each place. Results are compared in float32, so
that no rounding hides a bit. gate_up is looked at once more as it is run, gated. Exit code 1 if one
differs, or is further from cuBLAS' product than rounding explains.

``us`` is 60 rows in a graph, weights from memory; ``bench.bench_linear --device cuda`` has more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import gpu, limits
from bench.gpu import OURS, Contender, Device
from bench.gpu_report import Measured, WrongResultError, run_bench
from bench.harness import Row, parser, start
from bench.library_linear import product
from bench.linear_cuda import workspace_for
from bench.linear_shapes import GATE_UP, MOST_ROWS, SHAPES, Shape, random_inputs
from bench.linear_variants import PLANS
from specrt import ops
from specrt.models.row_check import differing_rows

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TREE_ROWS = 60
IN_USE, GATED = "in use", "gated"
_MOST_SETS = 8
_TOLERANCE = 1e-3
"""Of the largest of float32 sums in another order."""
_SOME = (0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 100, 127)
"""Places at which the layouts that are not in use are looked at: where a padded number of rows ends
and the next begins."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    shape: Shape
    dtype: str

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"

    def on(self, device: Device) -> tuple[Shape, torch.dtype]:
        """What stands for it on a device; a made-up one has small matrices."""
        is_real = device.place.device == "cuda"
        return self.shape.on(device), DTYPES[self.dtype] if is_real else device.place.dtype


def cases(is_quick: bool) -> Iterator[Case]:
    """The types in turn; the largest model's matrices are left out of a quick run."""
    for dtype in list(DTYPES)[: 1 if is_quick else None]:
        for shape in SHAPES[: 5 if is_quick else None]:
            yield Case(shape, dtype)


# --- bits -------------------------------------------------------------------------------------


class Linear:
    """``linear`` by one matrix, by one layout; a result is valid until the next.

    Args:
        weight: ``[N, K]``.
        workspace: enough for 128 rows, zeros before the first use.
        asked: further arguments of ``ops.linear``.
    """

    def __init__(
        self, weight: torch.Tensor, workspace: torch.Tensor | None, asked: dict[str, Any]
    ) -> None:
        self._weight, self._workspace, self._asked = weight, workspace, asked
        num_outputs = len(weight) // 2 if asked.get("is_gated") else len(weight)
        self._out = torch.empty(MOST_ROWS, num_outputs, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._out.fill_(float("nan"))  # what a launch leaves out must not be the last one's
        out = self._out[: len(x)]
        ops.linear(x, self._weight, out=out, workspace=self._workspace, **self._asked)
        return out


def layouts(case: Case, device: Device) -> dict[str, dict[str, Any]]:
    """Arguments that ask for each."""
    found: dict[str, dict[str, Any]] = {IN_USE: {}}
    if case.shape.matrix == GATE_UP and device.place.device == "cuda":
        found[GATED] = {"is_gated": True}
    return found | {name: {"plan": plan} for name, plan in PLANS.items()}


def check(case: Case, device: Device, x: torch.Tensor, weight: torch.Tensor) -> list[str]:
    """What is wrong, in words; a layout that the shape has no room for is none.

    Args:
        case: which.
        device: where.
        x: ``[128, K]``
        weight: ``[N, K]`` as it is there.
    """
    workspace = workspace_for([case.shape.on(device)], MOST_ROWS, device)
    expected, wrong = None, []
    for name, asked in layouts(case, device).items():
        linear = Linear(weight, workspace, asked)
        try:
            found = linear(x).clone()
        except ValueError:
            if name in PLANS:
                continue
            raise
        expected = found if expected is None else expected
        if name in PLANS and not found.equal(expected):
            wrong.append(f"{name}: not the bits in use")
        places = _SOME if name in PLANS else range(MOST_ROWS)
        counts = differing_rows(linear, x, places=places)
        differs = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
        wrong += [f"{name}: {differs}"] if differs else []
    assert expected is not None, "the layout in use comes first"
    return wrong + _far_from_library(expected, x, weight)


def _far_from_library(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> list[str]:
    """The library as an oracle, in float32."""
    library = torch.empty_like(found)
    product(x, weight.to(x.dtype), library)
    error = float((found - library).abs().max() / library.abs().max())
    if error <= _TOLERANCE:
        return []
    return [f"{error:.2g} of the largest off the library's"]


# --- cases ------------------------------------------------------------------------------------


def one_case(case: Case, device: Device, ceilings: limits.Ceilings, l2_bytes: int) -> Measured:
    """Bits first; no row if there is no memory for it.

    Raises:
        WrongResultError: a row's bits depend on the others, or on the layout.
    """
    shape, dtype = case.on(device)
    weight_bytes = shape.num_weights * dtype.itemsize
    room = device.free_bytes() - 8 * MOST_ROWS * (shape.num_outputs + shape.num_inputs) * 4
    num_sets = limits.input_sets(weight_bytes, weight_bytes, l2_bytes, room // 2, _MOST_SETS)
    if num_sets < 1:
        return None, {OURS: f"needs {weight_bytes / 1e9:.1f} GB"}
    x, weights = random_inputs(shape, dtype, device.place.device, num_sets)
    wrong = "; ".join(check(case, device, x, weights[0]))
    workspace = workspace_for([shape], TREE_ROWS, device)
    out = x.new_empty(TREE_ROWS, shape.num_outputs)

    def launch(weight: torch.Tensor) -> Callable[[], object]:
        return lambda: ops.linear(x[:TREE_ROWS], weight, out=out, workspace=workspace)

    timings = device.measure({OURS: Contender([launch(weight) for weight in weights])})
    row = _row(case, wrong, timings.graph[OURS], ceilings)
    if wrong:
        raise WrongResultError(f"of {MOST_ROWS} rows differ: {wrong}", row)
    return row, timings.failures


def _row(case: Case, wrong: str, seconds: float, ceilings: limits.Ceilings) -> Row:
    shape = case.shape
    work = limits.linear(shape.num_outputs, shape.num_inputs, TREE_ROWS)
    return {
        "model": shape.model,
        "matrix": shape.matrix,
        "shape": f"{shape.num_outputs}x{shape.num_inputs}",
        "dtype": case.dtype,
        "equal": not wrong,
        "differ": wrong,
        "us": 1e6 * seconds,
        "GB/s": shape.num_weights * limits.BF16 / seconds / 1e9,
        "% of limit": limits.figures(work, seconds, ceilings)["% of limit"],
    }


def run(args: argparse.Namespace, device: Device) -> None:
    """Look, measure and report what the budget allows."""
    run_bench("linear_rows", cases(args.quick), one_case, args, device)


def main() -> None:
    """The command."""
    arguments = parser(__doc__)
    gpu.add_arguments(arguments, has_cpu_side=False)
    args = start(arguments)
    run(args, gpu.chosen_device(args))


if __name__ == "__main__":
    main()
