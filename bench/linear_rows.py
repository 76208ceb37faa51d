"""Are the rows of ``linear`` independent of one another on this GPU, and how fast are weights read?

Every matrix of three models, in both 16-bit types. A row's bits must be the same at each of the 128
places of a product, with every number of rows, and alone: 128 cyclic
shifts of 128 rows bring each row to each place. Results are compared in float32, so that no
rounding hides a bit. Exit code 1 if one differs.

``us`` is a call of the op on 60 rows, ``product_us`` cuBLAS' product of 128 rows,
``torch_us`` a product of 60 rows in 16 bits; weights come from memory, not from the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench import gpu, limits
from bench.gpu import OURS, Contender, Device
from bench.gpu_report import Measured, WrongResultError, run_bench
from bench.harness import Row, parser, ratio_to, start
from specrt import ops
from specrt.models.row_check import ROWS, Linear, differing_rows, spread_rows

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TREE_ROWS = 60
_MOST_SETS = 8


@dataclass(frozen=True)
class Shape:
    """One matrix ``[num_outputs, num_inputs]`` of a model."""

    model: str
    matrix: str
    num_outputs: int
    num_inputs: int

    def __str__(self) -> str:
        return f"{self.model} {self.matrix} {self.num_outputs}x{self.num_inputs}"


SHAPES = (
    Shape("Llama-3-8B", "qkv", 6144, 4096),
    Shape("Llama-3-8B", "o", 4096, 4096),
    Shape("Llama-3-8B", "gate_up", 28672, 4096),
    Shape("Llama-3-8B", "down", 4096, 14336),
    Shape("Llama-3-8B", "head", 128256, 4096),
    Shape("Vicuna-7B", "qkv", 12288, 4096),
    Shape("Vicuna-7B", "gate_up", 22016, 4096),
    Shape("Vicuna-7B", "down", 4096, 11008),
    Shape("Vicuna-7B", "head", 32000, 4096),
    Shape("Llama-3-70B/4", "qkv", 2560, 8192),
    Shape("Llama-3-70B/4", "o", 8192, 2048),
    Shape("Llama-3-70B/4", "gate_up", 14336, 8192),
    Shape("Llama-3-70B/4", "down", 8192, 7168),
)
"""``/4``: a quarter of the model, as each of four GPUs has it."""


# --- bits -------------------------------------------------------------------------------------


def random_inputs(
    shape: Shape, dtype: torch.dtype, device: str, num_weights: int = 1
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``[128, K]`` of the activations' type, and weights; a function of the shape.

    Activations differ widely in size, so that sums in another order do differ.
    """
    seed = shape.num_outputs + shape.num_inputs
    generator = torch.Generator(device).manual_seed(seed)
    size = shape.num_outputs, shape.num_inputs
    weights = [
        torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)
        for _ in range(num_weights)
    ]
    activation = dtype if device == "cuda" else torch.float32
    return spread_rows(shape.num_inputs, activation, device, seed), weights


# --- cases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    shape: Shape
    dtype: str

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"

    def on(self, device: Device) -> tuple[Shape, torch.dtype]:
        """What stands for it on a device; a made-up one has small matrices."""
        if device.place.device == "cuda":
            return self.shape, DTYPES[self.dtype]
        shape = self.shape
        small = Shape(shape.model, shape.matrix, shape.num_outputs // 256, shape.num_inputs // 64)
        return small, device.place.dtype


def cases(is_quick: bool) -> Iterator[Case]:
    """The types in turn; the largest model's matrices are left out of a quick run."""
    for dtype in list(DTYPES)[: 1 if is_quick else None]:
        for shape in SHAPES[: 5 if is_quick else None]:
            yield Case(shape, dtype)


def contenders(x: torch.Tensor, weights: list[torch.Tensor]) -> dict[str, Contender]:
    """The op, cuBLAS' product of 128 rows, and of as many rows as there are."""
    num_outputs = len(weights[0])
    size = ops.linear_workspace(*weights[0].shape, ROWS)
    workspace = torch.zeros(size, device=x.device)
    sums = torch.empty(ROWS, num_outputs, device=x.device)
    tree, out = x[:TREE_ROWS], x.new_empty(TREE_ROWS, num_outputs)

    def each(launch: Callable[[torch.Tensor], object]) -> Contender:
        return Contender([lambda weight=weight: launch(weight) for weight in weights])

    return {
        OURS: each(lambda weight: ops.linear(tree, weight, out=out, workspace=workspace)),
        "product": each(lambda weight: _padded_product(x, weight, sums)),
        "torch": each(lambda weight: torch.mm(tree, weight.t(), out=out)),
    }


def _padded_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """cuBLAS' of 128 rows, with float32 results."""
    if x.dtype == torch.float32:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), torch.float32, out=out)


def one_case(case: Case, device: Device, ceilings: limits.Ceilings, l2_bytes: int) -> Measured:
    """Bits first; no row if there is no memory for it.

    Raises:
        WrongResultError: a row's bits depend on the others.
    """
    shape, dtype = case.on(device)
    work = limits.linear(shape.num_outputs, shape.num_inputs, TREE_ROWS)
    weight_bytes = shape.num_outputs * shape.num_inputs * dtype.itemsize
    room = device.free_bytes() - 8 * ROWS * (shape.num_outputs + shape.num_inputs) * 4
    num_sets = limits.input_sets(weight_bytes, weight_bytes, l2_bytes, room // 2, _MOST_SETS)
    if num_sets < 1:
        return None, {OURS: f"needs {weight_bytes / 1e9:.1f} GB"}
    x, weights = random_inputs(shape, dtype, device.place.device, num_sets)
    counts = differing_rows(Linear(weights[0]), x)
    differs = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
    timings = device.measure(contenders(x, weights))
    figures = limits.figures(work, timings.graph[OURS], ceilings)
    row = _row(case, differs, timings, figures["% of limit"]) | {"input_sets": num_sets}
    if differs:
        raise WrongResultError(f"of {ROWS} rows differ: {differs}", row)
    return row, timings.failures


def _row(case: Case, differs: str, timings: gpu.Timings, share: float) -> Row:
    shape, ours = case.shape, timings.graph[OURS]
    product, torchs = timings.graph.get("product"), timings.graph.get("torch")
    weight_bytes = shape.num_outputs * shape.num_inputs * limits.BF16
    return {
        "model": shape.model,
        "matrix": shape.matrix,
        "shape": f"{shape.num_outputs}x{shape.num_inputs}",
        "dtype": case.dtype,
        "equal": not differs,
        "differ": differs,
        "us": 1e6 * ours,
        "GB/s": weight_bytes / ours / 1e9,
        "% of limit": share,
        "eager_us": 1e6 * timings.eager[OURS],
        "product_us": None if product is None else 1e6 * product,
        "product GB/s": None if product is None else weight_bytes / product / 1e9,
        "torch_us": None if torchs is None else 1e6 * torchs,
        "torch/ours": None if torchs is None else ratio_to(torchs, ours),
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
