"""Products by packed bfloat16 to the bit: float32 sums in the order of matrix units, in numpy.

For each 32 of k and each part of x: ``sum += even + odd``, two chains of fused multiplications from
+0 over the even and the odd k. Rounded to nearest; denormals are taken and given as zeros.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
LEAST = np.float32(2.0**-126)
LEAST_ROUNDED = 2.0**-126 - 2.0**-151
"""What is smaller stays tiny when it is rounded to 24 bits."""


def flushed(x: Floats) -> Floats:
    return np.where(np.abs(x) < LEAST, np.copysign(np.float32(0), x), x)


def added(a: Floats, b: Floats) -> Floats:
    return flushed(flushed(a) + flushed(b))


def bfloat16(x: Floats) -> Floats:
    """The nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(
        0xFFFF0000
    )
    return np.where(np.isnan(x), x, rounded.view(np.float32))


def fused(a: Floats, b: Floats, c: Floats) -> Floats:
    """``a * b + c`` rounded once, of a and b of bfloat16."""
    product = a.astype(np.float64) * b  # exact
    total = product + c
    # Rounded to odd, the float64 rounds on to the float32 that the exact sum rounds to.
    back = total - product
    rest = (product - (total - back)) + (c - back)
    is_odd = (total.view(np.int64) & 1).astype(bool)
    towards = np.where(rest > 0, np.inf, -np.inf)
    is_kept = is_odd | ~np.isfinite(total) | ~(rest != 0)
    total = np.where(is_kept, total, np.nextafter(total, towards))
    is_tiny = np.abs(total) < LEAST_ROUNDED
    return np.where(is_tiny, np.copysign(0.0, total), total).astype(np.float32)


def split(x: Floats) -> tuple[Floats, Floats]:
    """The two parts of bfloat16, and none of them denormal."""
    x = flushed(x)
    high = bfloat16(x)
    return high, bfloat16(flushed(x - high))


def product(
    x: Floats,
    weight: Floats,
    bias: Floats | None = None,
    residual: Floats | None = None,
    *,
    num_parts: int,
) -> Floats:
    """``[M, N]`` of ``x`` ``[M, K]`` and ``weight`` ``[N, K]`` of values that bfloat16 has."""
    with np.errstate(all="ignore"):
        parts, w = split(x)[:num_parts], flushed(weight)
        total = np.zeros((len(x), len(w)), np.float32)
        for start in range(0, x.shape[1], 32):
            for part in parts:
                chains = [np.zeros_like(total), np.zeros_like(total)]
                for k in range(start, min(start + 32, x.shape[1])):
                    chains[k % 2] = fused(part[:, k, None], w[None, :, k], chains[k % 2])
                total = added(total, added(*chains))
        for more in (bias, residual):
            total = total if more is None else added(total, more)
        return total
