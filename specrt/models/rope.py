"""The table of rotary angles, for Hugging Face's rope types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


def rope_table(
    head_dim: int,
    theta: float,
    max_positions: int,
    scaling: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Cosines, then sines, of every position's angles, computed in float64.

    Args:
        head_dim: d, even.
        theta: the base of the frequencies.
        max_positions: rows of the table.
        scaling: a checkpoint's ``rope_scaling`` (or ``rope_parameters``): types default, linear and
            llama3.

    Returns:
        ``[max_positions, d]`` float32; the first d / 2 columns are cosines.

    Raises:
        ValueError: the rope type is not supported, or ``head_dim`` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even number, got {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = _scaled(1.0 / theta**exponents, scaling or {})
    positions = torch.arange(max_positions, dtype=torch.float64)
    angles = positions[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


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
