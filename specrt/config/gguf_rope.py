"""Rotary embedding as a GGUF file states it, in the words of a ``config.json``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from specrt.config.gguf_header import GgufHeader
from specrt.config.values import decimal, positive
from specrt.types import CheckpointError

ROTARY_FACTORS = "rope_freqs.weight"
"""The tensor that frequencies are divided by."""
LINEAR = ("rope.scaling.factor", "rope.scale_linear")
"""Keys of the factor of linear scaling; the second is an old file's."""

# Of Llama 3.1 and later: its own original context first, then any that is a power of two.
_LOW, _HIGH = 1.0, 4.0
_CONTEXTS = (8192, *(2**power for power in range(6, 21)))


def read_gguf_rope(header: GgufHeader, family: str, head_dim: int) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of a GGUF file.

    Args:
        header: the file's.
        family: what the file's keys of the architecture begin with.
        head_dim: d.

    Raises:
        CheckpointError: a type that is not supported, or factors that are no Llama 3 model's.
    """
    source = str(header.file)
    key = f"{family}.rope.freq_base"
    theta = decimal(positive(header.metadata.get(key, 10000.0), key, source))
    key = f"{family}.rope.scaling.type"
    kind = header.metadata.get(key, "linear")
    if kind not in ("linear", "none"):
        raise CheckpointError(f"{source}: {key}: {kind!r} is not supported (supported: linear)")
    scaling = _linear(header, family) if kind == "linear" else None
    if ROTARY_FACTORS in header.tensors:
        factors = _read_factors(header, head_dim)
        if scaling is not None:
            raise CheckpointError(f"{source}: {ROTARY_FACTORS}: not supported with linear scaling")
        scaling = _llama3(factors, theta, source)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _linear(header: GgufHeader, family: str) -> dict[str, Any] | None:
    for key in (f"{family}.{name}" for name in LINEAR):
        factor = header.metadata.get(key)
        if factor:  # 0 says that there is none
            factor = decimal(positive(factor, key, str(header.file)))
            return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    return None


def _read_factors(header: GgufHeader, head_dim: int) -> npt.NDArray[np.float32]:
    place = header.tensors[ROTARY_FACTORS]
    if place.shape != (head_dim // 2,) or place.kind != "F32":
        raise CheckpointError(
            f"{header.file}: {ROTARY_FACTORS}: expected {[head_dim // 2]} of F32, "
            f"got {list(place.shape)} of {place.kind}"
        )
    with header.file.open("rb") as content:
        content.seek(place.start)
        return np.frombuffer(content.read(place.num_bytes), "<f4")


def _llama3(factors: npt.NDArray[np.float32], theta: float, source: str) -> dict[str, Any] | None:
    """The settings that these factors were computed from; None where they change nothing."""
    if bool((factors == 1).all()):
        return None
    factor = float(factors.max())
    exponents = np.arange(len(factors)) / len(factors)
    for context in _CONTEXTS:
        turns = context / (2 * np.pi * theta**exponents)
        kept = np.clip((turns - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
        if np.allclose(factors, 1 / ((1 - kept) / factor + kept), rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": decimal(factor),
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": context,
            }
    raise CheckpointError(
        f"{source}: {ROTARY_FACTORS}: expected the factors of a Llama 3 model, got others "
        f"(the largest is {factor:g})"
    )
