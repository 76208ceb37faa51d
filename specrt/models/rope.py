"""The table of rotary angles, for Hugging Face's rope types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.reuse import power_of_two
from specrt.tree import MAX_NODES

# Positions computed at a time, always so many and from a multiple of it on: the bits of a row must
# not depend on how far a table reaches. Few enough that torch does not split them over threads.
_BLOCK = 128


def rope_table(
    head_dim: int,
    theta: float,
    max_positions: int,
    scaling: Mapping[str, Any] | None = None,
    *,
    padded_head_dim: int | None = None,
) -> torch.Tensor:
    """Cosines, then sines, of every position's angles, computed in float64.

    Args:
        head_dim: d, even.
        theta: the base of the frequencies.
        max_positions: rows of the table.
        scaling: a checkpoint's ``rope_scaling`` (or ``rope_parameters``): types default, linear and
            llama3.
        padded_head_dim: P, even, where heads are padded (:mod:`specrt.models.heads`); what is put
            in is not turned. None: d.

    Returns:
        ``[max_positions, P]`` float32; the first P / 2 columns are cosines.

    Raises:
        ValueError: the rope type is not supported, or ``head_dim`` is odd.
    """
    width = padded_head_dim or head_dim
    table = torch.empty(max_positions, width)
    _fill(table, 0, _frequencies(head_dim, theta, scaling or {}, width))
    return table


class RotaryTable:
    """The rotary table of a model as far as sequences have needed it.

    Several models may share one. It never writes to a tensor that it has given away: whoever needs
    more positions takes the longer one, and captured launches over the shorter one stay right while
    somebody keeps it.

    Args:
        config: the model's.
        padded_head_dim: the head size that its kernels run.
        device: where the rows lie.
    """

    def __init__(self, config: ModelConfig, padded_head_dim: int, device: Device) -> None:
        self._kind = _kind(config, padded_head_dim, device)
        self._frequencies = _frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling or {}, padded_head_dim
        )
        # Nodes of a tree at the context limit may lie past it; they are never accepted.
        self.limit = config.max_positions + MAX_NODES
        """Rows that are enough for any sequence."""
        self._device = device
        self._rows = device.empty(0, padded_head_dim)

    def serves(self, config: ModelConfig, padded_head_dim: int, device: Device) -> bool:
        """Whether another model's table would hold the same rows at the same place."""
        return self._kind == _kind(config, padded_head_dim, device)

    def reaching(self, num_positions: int) -> torch.Tensor:
        """``[R, P]`` float32, R at least ``num_positions`` or :attr:`limit`.

        R is rounded up to a power of two, so that rows are copied about once.
        """
        have = len(self._rows)
        if min(num_positions, self.limit) > have:
            wanted = min(self.limit, max(_BLOCK, power_of_two(num_positions)))
            longer = self._device.empty(wanted, self._rows.shape[1])
            longer[:have] = self._rows
            more = torch.empty(wanted - have, self._rows.shape[1])
            _fill(more, have, self._frequencies)
            self._device.upload(more, longer[have:])
            self._rows = longer
        return self._rows


def rotary_table(
    config: ModelConfig, padded_head_dim: int, device: Device, other: RotaryTable | None
) -> RotaryTable:
    """``other`` where that holds a model's rows, else a table of its own."""
    if other is not None and other.serves(config, padded_head_dim, device):
        return other
    return RotaryTable(config, padded_head_dim, device)


def _kind(config: ModelConfig, padded_head_dim: int, device: Device) -> tuple[Any, ...]:
    scaling = dict(config.rope_scaling or {})
    return config.head_dim, config.rope_theta, scaling, padded_head_dim, device.place


def _frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any], width: int
) -> torch.Tensor:
    """``[P / 2]`` float64; beyond d / 2 they are 0, for an angle of 0 turns nothing."""
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even number, got {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = torch.zeros(width // 2, dtype=torch.float64)
    frequencies[: head_dim // 2] = _scaled(1.0 / theta**exponents, scaling)
    return frequencies


def _fill(table: torch.Tensor, first: int, frequencies: torch.Tensor) -> None:
    """Compute the rows from position ``first`` on."""
    last = first + len(table)
    for start in range(first - first % _BLOCK, last, _BLOCK):
        positions = torch.arange(start, start + _BLOCK, dtype=torch.float64)
        angles = positions[:, None] * frequencies
        block = torch.cat([angles.cos(), angles.sin()], dim=1)
        begin, end = max(start, first), min(start + _BLOCK, last)
        table[begin - first : end - first] = block[begin - start : end - start]


def _scaled(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    raise ValueError(f"scaling: rope type {kind!r} is not supported (default, linear or llama3)")


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Long waves are slowed by ``factor``, short ones kept, those between interpolated."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    turns = context * frequencies / (2 * math.pi)  # within the original context
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies
