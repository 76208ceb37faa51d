"""Random weights as GGUF files keep them: of floats, or of blocks whose bytes are drawn.

Every byte of a block but its scales may be anything. Scales are such that weights deviate by about
:data:`~bench.random_target.DEVIATION`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from bench.random_target import DEVIATION

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Block:
    """A block of weights in a row."""

    num_weights: int
    num_bytes: int
    halves: Mapping[int, float]
    """Float16 numbers by their offset in bytes, about so large; all else is drawn."""


_BYTE = 255 / 12**0.5  # deviation of a drawn byte
_NIBBLE, _MIDDLE = 16 / 12**0.5, 7.5
_SIX_BITS, _SIX_BIT_SCALE = 64 / 12**0.5, 32.0
_K_SCALE = DEVIATION / _NIBBLE / _SIX_BIT_SCALE

BLOCKS = {
    "q8_0": Block(32, 34, MappingProxyType({0: DEVIATION / _BYTE})),
    "q4_0": Block(32, 18, MappingProxyType({0: DEVIATION / _NIBBLE})),
    "q4_1": Block(
        32, 20, MappingProxyType({0: DEVIATION / _NIBBLE, 2: -_MIDDLE * DEVIATION / _NIBBLE})
    ),
    "q4_k": Block(256, 144, MappingProxyType({0: _K_SCALE, 2: _MIDDLE * _K_SCALE})),
    "q6_k": Block(256, 210, MappingProxyType({208: DEVIATION / _BYTE / _SIX_BITS})),
}
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def row_bytes(kind: str, num_inputs: int) -> int:
    """Of a row of so many weights, whole blocks."""
    if kind in FLOATS:
        return num_inputs * FLOATS[kind].itemsize
    block = BLOCKS[kind]
    return num_inputs // block.num_weights * block.num_bytes


def random_rows(kind: str, num_rows: int, num_inputs: int, seed: int) -> Bytes:
    """``[num_rows, bytes a row]``, a function of its arguments.

    Args:
        kind: one of :data:`FLOATS` or :data:`BLOCKS`.
        num_rows: N.
        num_inputs: K, whole blocks of the kind.
        seed: of the draws.

    Raises:
        ValueError: ``num_inputs`` are no whole blocks.
    """
    if kind in FLOATS:
        generator = torch.Generator().manual_seed(seed)
        made = torch.empty(num_rows, num_inputs, dtype=FLOATS[kind])
        raw: Bytes = made.normal_(0.0, DEVIATION, generator=generator).view(torch.uint8).numpy()
        return raw
    block = BLOCKS[kind]
    if num_inputs % block.num_weights:
        raise ValueError(f"num_inputs: expected blocks of {block.num_weights}, got {num_inputs}")
    draws = np.random.default_rng(seed)
    count = num_rows * (num_inputs // block.num_weights)
    blocks = np.frombuffer(draws.bytes(count * block.num_bytes), np.uint8).copy()
    blocks = blocks.reshape(count, block.num_bytes)
    spread = draws.uniform(0.75, 1.25, count)
    for offset, value in block.halves.items():
        halves = (value * spread).astype("<f2")
        blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(count, 2)
    return blocks.reshape(num_rows, -1)
