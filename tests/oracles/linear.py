"""The order of sums of ``linear`` on a GPU (``csrc/linear/slices.h``), for any way to add 16."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def slices_of(num_outputs: int, num_inputs: int) -> tuple[int, int]:
    """How many slices K has, and how long each but the last is."""
    tiles, count = -(-num_outputs // 64), 1
    while count < 16 and tiles * count < 256 and num_inputs // (2 * count) >= 512:
        count *= 2
    depth = -(-num_inputs // (64 * count)) * 64
    return -(-num_inputs // depth), depth


def chain(x: Tensor, weight: Tensor) -> Tensor:
    """Groups of 16, one after another, each summed in float32 in index order before it is added."""
    total = torch.zeros(len(x), len(weight))
    for first in range(0, x.shape[1], 16):
        group = torch.zeros_like(total)
        for k in range(first, min(first + 16, x.shape[1])):
            group = group + x[:, k, None] * weight[None, :, k]
        total = total + group
    return total


def tree(parts: list[Tensor]) -> Tensor:
    """Merged by twos: (0 + 1) + (2 + 3), and who has no partner goes on alone."""
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return parts[0]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """``[M, N]`` float32: what is rounded in the end.

    Args:
        x: ``[M, K]`` bfloat16 or float16, whose products are exact in float32.
        weight: ``[N, K]`` likewise.
        bias: ``[N]`` float32.
        residual: ``[M, N]``
        scale: ``[N]`` float32, of weights that were narrower.
    """
    _, depth = slices_of(*weight.shape)
    pieces = zip(x.float().split(depth, 1), weight.float().split(depth, 1), strict=True)
    out = tree([chain(*piece) for piece in pieces])
    if scale is not None:
        out = out * scale
    if bias is not None:
        out = out + bias
    return out if residual is None else out + residual.float()


def gated(pairs: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows that hold 8 of gate and 8 of up by turns."""
    gate, up = pairs.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return (F.silu(gate) * up).flatten(-2)
