"""Whether a tensor core sums all rows of a product alike on this GPU: looked at, where nobody has.

Law 1 rests on it. That ``linear`` gives each row the same sums in the same order, whatever the
number of rows, is its own construction; that one row's sum does not depend on its place among the
columns of an ``mma``, or on what is in the others, is a fact about hardware.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from specrt import ops
from specrt.device import Device

SEEN_CAPABILITIES = frozenset({(9, 0)})
"""Compute capabilities of GPUs on which ``python -m bench.linear_rows`` has found every row's bits
alike, and nothing needs to be looked at."""

ROWS = 128
"""The most of one tile: every place that a row can have."""
SHAPES = ((128, 2048), (72, 520))
"""Of the matrices that are looked at: in slices and in one, of whole tiles and not."""
PLACES = (0, 1, 7, 8, 31, 64, 100, 127)
"""By how much rows are moved, and how many less one there are, when a model is loaded."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""``[M, K]`` to ``[M, N]`` float32, M up to 128; valid until the next call."""


class Linear:
    """``linear`` by one matrix, always with the same workspace, as a target runs it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        num_outputs, num_inputs = weight.shape
        size = ops.linear_workspace(num_outputs, num_inputs, ROWS)
        self._workspace = weight.new_zeros(size, dtype=torch.float32)
        self._out = weight.new_empty(ROWS, len(weight), dtype=torch.float32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self._out[: len(x)]
        return ops.linear(x, self._weight, out=out, workspace=self._workspace)


def differing_rows(
    product: Product, x: torch.Tensor, *, places: Sequence[int] = range(ROWS)
) -> dict[str, int]:
    """How many of 128 rows have other bits at other places, among fewer, or alone.

    Args:
        product: what is looked at; results are compared in float32, so that no rounding hides a
            bit.
        x: ``[128, K]``
        places: by how much rows are moved; as many less one are given; which are alone.
    """
    expected = product(x).view(torch.int32).clone()
    differs = torch.zeros(3, len(x), dtype=torch.bool, device=x.device)
    for i in places:
        shifted = product(x.roll(i, 0)).view(torch.int32)
        differs[0] |= (shifted.roll(-i, 0) != expected).any(dim=1)
        fewer = product(x[: i + 1]).view(torch.int32)
        differs[1, : i + 1] |= (fewer != expected[: i + 1]).any(dim=1)
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
        torch.empty(ROWS, num_inputs, dtype=dtype, device=device).normal_(generator=generator)
        for _ in range(2)
    )
    return sizes.exp2() * signs


def check_rows(device: Device, dtype: torch.dtype) -> None:
    """Look at two small products on a GPU of a kind not seen before; some milliseconds.

    Args:
        device: where a model is to run; on the CPU nothing needs to be looked at.
        dtype: of its matrices.

    Raises:
        ValueError: rows depend on one another.
    """
    if device.place.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device.place)
    if capability in SEEN_CAPABILITIES:
        return
    check_products(device.place, dtype)
    logging.getLogger("specrt").info(
        "linear: no test has seen a GPU of compute capability %d.%d; in %d products every row's "
        "bits are its own",
        *capability,
        len(SHAPES),
    )


def check_products(place: torch.device, dtype: torch.dtype) -> None:
    """Compare the rows of a product by a matrix of each of :data:`SHAPES`.

    Raises:
        ValueError: as :func:`check_rows`.
    """
    for shape in SHAPES:
        generator = torch.Generator(place).manual_seed(shape[0])
        weight = torch.empty(shape, dtype=dtype, device=place).normal_(generator=generator)
        x = spread_rows(shape[1], dtype, place)
        counts = differing_rows(Linear(weight), x, places=PLACES)
        differs = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
        if differs:
            raise ValueError(
                f"linear: on {place} a row's bits depend on other rows: by a matrix "
                f"{list(shape)}, of {ROWS} rows differ {differs}. No text could be relied on; "
                "device='cpu' runs this model"
            )
