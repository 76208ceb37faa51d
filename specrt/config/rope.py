"""Rotary embedding as a ``config.json`` states it: its type and factors, and how far it reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from specrt.config.values import positive, size_of
from specrt.types import CheckpointError

_FACTORS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


class Rope(NamedTuple):
    """What the keys of rotary embedding come to."""

    theta: float
    scaling: dict[str, Any] | None
    """``rope_type`` and that type's factors; None for plain rotary embedding."""
    context: int
    """Positions the model was made for."""


def read_rope(data: Mapping[str, Any], max_positions: int, source: str) -> Rope:
    """Read a configuration's rotary embedding, whichever style it came in.

    Args:
        data: the content of a ``config.json``.
        max_positions: its ``max_position_embeddings``, or the family's default.
        source: what errors call the file.

    Raises:
        CheckpointError: a type that is not supported, a factor that is missing or malformed.
    """
    given = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{source}: rope_scaling: expected an object, got {given!r}")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _FACTORS:
        supported = ", ".join(_FACTORS)
        raise CheckpointError(
            f"{source}: rope type {kind!r} is not supported (supported: {supported})"
        )
    partial = given.get("partial_rotary_factor", data.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(f"{source}: partial_rotary_factor: expected 1, got {partial!r}")
    factors: dict[str, Any] = {}
    for key in _FACTORS[kind]:
        value = _factor(data, given, key, max_positions, source)
        factors[key] = positive(value, f"rope_scaling.{key}", source)
    theta = given.get("rope_theta", data.get("rope_theta", 10000.0))
    return Rope(
        positive(theta, "rope_theta", source),
        None if kind == "default" else {"rope_type": kind, **factors},
        _stretched(data, factors["factor"], max_positions, source)
        if kind == "linear"
        else max_positions,
    )


def _factor(
    data: Mapping[str, Any], given: Mapping[str, Any], key: str, max_positions: int, source: str
) -> Any:
    if key == "original_max_position_embeddings":
        # transformers lets the key at the top level win.
        return data.get(key, given.get(key, max_positions))
    if key not in given:
        raise CheckpointError(f"{source}: missing key rope_scaling.{key}")
    return given[key]


def _stretched(data: Mapping[str, Any], factor: float, max_positions: int, source: str) -> int:
    """Of linear rope some checkpoints (Vicuna 16k, LongChat) state as max_position_embeddings what
    was before stretching, and as max_sequence_length what came of it; most state the latter."""
    if data.get("max_sequence_length") is None:
        return max_positions
    said = size_of(data["max_sequence_length"], "max_sequence_length", source)
    return max(max_positions, int(min(said, max_positions * factor)))
