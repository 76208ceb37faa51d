"""Whether the rows of a matrix product are summed alike on this GPU: looked at, where nobody has.

Everything rests on it (law 1): a row's bits must be the same at each of the 128 places of a
product, with every number of rows, and alone beside what others left behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from time import perf_counter

import torch

from specrt import ops
from specrt.models.loader import Weights
from specrt.ops.linear import GEMM_ROWS

SEEN_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()
"""Compute capabilities of GPUs on which ``python -m bench.linear_rows`` has found every row's bits
alike, and a model's own shapes need not be looked at."""

PLACES = (0, 1, 7, 8, 31, 64, 100, 127)
"""By how much rows are moved, and how many less one there are, when a model is loaded."""
LEFT_BEHIND = (0x00, 0x41)
"""Bytes beside a lone row then: zeros, and a number of some size in every type."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""``[M, K]`` to ``[M, N]`` float32, M up to 128; valid until the next call."""


class Linear:
    """``linear`` by one matrix, always with the same workspace, as a target runs it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        size = ops.linear_workspace(*weight.shape)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=weight.device)
        self._out = torch.empty(GEMM_ROWS, len(weight), device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self._out[: len(x)]
        return ops.linear(x, self._weight, out=out, workspace=self._workspace)

    def leave_behind(self, byte: int) -> None:
        """What the rows that are not given hold."""
        self._workspace.fill_(byte)


def differing_rows(
    product: Product,
    x: torch.Tensor,
    leave_behind: Callable[[int], None] = lambda byte: None,
    *,
    places: Sequence[int] = range(GEMM_ROWS),
    left: Sequence[int] = (0xFF,),
) -> dict[str, int]:
    """How many of 128 rows have other bits at other places, among fewer, or alone.

    Args:
        product: what is looked at; results are compared in float32, so that no rounding hides a
            bit.
        x: ``[128, K]``
        leave_behind: told a byte to fill the product's memory with, before a row is alone.
        places: by how much rows are moved; as many less one are given; which are alone.
        left: the bytes; 0xFF is NaN in every type.
    """
    expected = product(x).view(torch.int32).clone()
    differs = torch.zeros(3, len(x), dtype=torch.bool, device=x.device)
    for i in places:
        shifted = product(x.roll(i, 0)).view(torch.int32)
        differs[0] |= (shifted.roll(-i, 0) != expected).any(dim=1)
        fewer = product(x[: i + 1]).view(torch.int32)
        differs[1, : i + 1] |= (fewer != expected[: i + 1]).any(dim=1)
        for byte in left:
            leave_behind(byte)
            alone = product(x[i : i + 1]).view(torch.int32)
            differs[2, i] |= (alone[0] != expected[i]).any()
    names = "at other places", "among fewer", "alone"
    return dict(zip(names, differs.sum(dim=1).tolist(), strict=True))


def spread_rows(
    num_inputs: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> torch.Tensor:
    """``[128, K]`` of values of very different sizes, so that sums in another order differ."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes, signs = (
        torch.empty(GEMM_ROWS, num_inputs, dtype=dtype, device=device).normal_(generator=generator)
        for _ in range(2)
    )
    return sizes.exp2() * signs


def check_rows(weights: Weights) -> None:
    """Look at the products of a model's own matrices, on a GPU of a kind not seen before.

    Each shape is multiplied 33 times: of Llama-3-8B 33 · 1.49 GB are read, 18 ms at 2.76 TB/s.

    Args:
        weights: a target's, where it runs; on the CPU nothing needs to be looked at.

    Raises:
        ValueError: rows depend on one another; names the matrix and its shape.
    """
    device = weights.embed.device
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability in SEEN_CAPABILITIES:
        return
    started, shapes = perf_counter(), matrices(weights)
    check_products(shapes)
    logging.getLogger("specrt").info(
        "linear: no test has seen a GPU of compute capability %d.%d; in %d products of this model "
        "every row's bits are its own (%.2f s)",
        *capability,
        len(shapes),
        perf_counter() - started,
    )


def matrices(weights: Weights) -> dict[str, torch.Tensor]:
    """One matrix of each shape that a model multiplies by, under its name."""
    layer = weights.layers[0]
    named = {field.name: getattr(layer, field.name) for field in fields(layer)}
    named["lm_head"] = weights.lm_head
    by_shape: dict[torch.Size, tuple[str, torch.Tensor]] = {}
    for name, tensor in named.items():
        if tensor is not None and tensor.dim() == 2:
            by_shape.setdefault(tensor.shape, (name, tensor))
    return dict(by_shape.values())


def check_products(shapes: Mapping[str, torch.Tensor]) -> None:
    """Compare the rows of a product by each matrix.

    Raises:
        ValueError: as :func:`check_rows`.
    """
    for name, weight in shapes.items():
        dtype = weight.dtype if weight.device.type == "cuda" else torch.float32
        linear = Linear(weight)
        x = spread_rows(weight.shape[1], dtype, weight.device)
        counts = differing_rows(linear, x, linear.leave_behind, places=PLACES, left=LEFT_BEHIND)
        differs = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
        if differs:
            raise ValueError(
                f"linear: on {weight.device} a row's bits depend on other rows: by {name} "
                f"{list(weight.shape)}, of {GEMM_ROWS} rows differ {differs}. No text could be "
                "relied on; device='cpu' runs this model"
            )
