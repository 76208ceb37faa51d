"""Values of a checkpoint's JSON, refused by file and key."""

from __future__ import annotations

from typing import Any

import numpy as np

from specrt.types import CheckpointError

# Kernels count positions in 32 bits, past the context's end too.
_LARGEST_SIZE = 2**30


def size_of(value: Any, key: str, source: str) -> int:
    """A number of things.

    Raises:
        CheckpointError: it is no integer, or too small or large for one.
    """
    return integer(value, key, source, 1, _LARGEST_SIZE)


def positive(value: Any, key: str, source: str) -> float:
    """A positive number.

    Raises:
        CheckpointError: it is none, or float32 cannot compute with it.
    """
    return number(value, key, source, 1e-30, 1e30)


def integer(value: Any, key: str, source: str, least: int, most: int) -> int:
    """An integer of a range, both ends included.

    Raises:
        CheckpointError: it is none.
    """
    if type(value) is not int or not least <= value <= most:
        raise _refusal(value, key, source, f"an integer in {least}..{most}")
    return value


def number(value: Any, key: str, source: str, least: float, most: float) -> float:
    """A number of a range, both ends included.

    Raises:
        CheckpointError: it is none.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise _refusal(value, key, source, f"a number in {least:g}..{most:g}")
    return float(value)


def decimal(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def flag(value: Any, key: str, source: str) -> bool:
    """A truth value.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, bool):
        raise _refusal(value, key, source, "true or false")
    return value


def token_ids(value: Any, key: str, source: str) -> list[int]:
    """A list of integers, outside of the vocabulary too.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, list) or any(type(token) is not int for token in value):
        raise _refusal(value, key, source, "a list of token ids")
    return value


def _refusal(value: Any, key: str, source: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{source}: {key}: expected {expected}, got {value!r}")
