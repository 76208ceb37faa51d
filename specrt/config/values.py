"""Numbers of a configuration, refused by file and key."""

from __future__ import annotations

from typing import Any

from specrt.types import CheckpointError

# Kernels count positions in 32 bits, past the context's end too.
_LARGEST_SIZE = 2**30


def size_of(value: Any, key: str, source: str) -> int:
    """A number of things.

    Raises:
        CheckpointError: it is no integer, or too small or large for one.
    """
    if type(value) is not int or not 1 <= value <= _LARGEST_SIZE:
        raise CheckpointError(
            f"{source}: {key}: expected an integer in 1..{_LARGEST_SIZE}, got {value!r}"
        )
    return value


def positive(value: Any, key: str, source: str) -> float:
    """A positive number.

    Raises:
        CheckpointError: it is none, or float32 cannot compute with it.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 1e-30 <= value <= 1e30:
        raise CheckpointError(f"{source}: {key}: expected a number in 1e-30..1e30, got {value!r}")
    return float(value)
