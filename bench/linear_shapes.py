"""Matrices of three models, as ``linear`` multiplies by them on a GPU, and inputs to multiply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.gpu import Device
from specrt.models.row_check import spread_rows

MOST_ROWS = 128
"""That a tree may have; further rows are a prompt's."""
GATE_UP = "gate_up"


@dataclass(frozen=True)
class Shape:
    """One matrix ``[num_outputs, num_inputs]`` of a model."""

    model: str
    matrix: str
    num_outputs: int
    num_inputs: int

    def __str__(self) -> str:
        return f"{self.model} {self.matrix} {self.num_outputs}x{self.num_inputs}"

    @property
    def num_weights(self) -> int:
        return self.num_outputs * self.num_inputs

    def on(self, device: Device) -> Shape:
        """What stands for it on a device; a made-up one has small matrices."""
        if device.place.device == "cuda":
            return self
        return Shape(self.model, self.matrix, self.num_outputs // 256, self.num_inputs // 64)


SHAPES = (
    Shape("Llama-3-8B", "qkv", 6144, 4096),
    Shape("Llama-3-8B", "o", 4096, 4096),
    Shape("Llama-3-8B", GATE_UP, 28672, 4096),
    Shape("Llama-3-8B", "down", 4096, 14336),
    Shape("Llama-3-8B", "head", 128256, 4096),
    Shape("Vicuna-7B", "qkv", 12288, 4096),
    Shape("Vicuna-7B", GATE_UP, 22016, 4096),
    Shape("Vicuna-7B", "down", 4096, 11008),
    Shape("Vicuna-7B", "head", 32000, 4096),
    Shape("Llama-3-70B/4", "qkv", 2560, 8192),
    Shape("Llama-3-70B/4", "o", 8192, 2048),
    Shape("Llama-3-70B/4", GATE_UP, 14336, 8192),
    Shape("Llama-3-70B/4", "down", 8192, 7168),
)
"""``/4``: a quarter of the model, as each of four GPUs has it. Vicuna's o is Llama's."""


def layer_shapes(model: str) -> list[Shape]:
    """The four matrices of a layer, in the order in which they are multiplied by."""
    order = ("qkv", "o", GATE_UP, "down")
    found = {shape.matrix: shape for shape in SHAPES if shape.model == model}
    if "o" not in found:
        hidden = found["qkv"].num_inputs
        found["o"] = Shape(model, "o", hidden, hidden)
    return [found[matrix] for matrix in order]


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


def bytes_of(shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    """Of their weights."""
    return sum(shape.num_weights for shape in shapes) * dtype.itemsize
