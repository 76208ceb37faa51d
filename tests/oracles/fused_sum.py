"""One sum of a tensor core as MMA-Sim models it (arXiv 2511.10909), in fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

FLOAT32_MIN, HALF_MIN = -126, -14  # exponents of the smallest normal numbers


def exponent(x: float, smallest: int) -> int:
    """Of a number of the type whose normal numbers begin at ``2 ** smallest``."""
    return max(math.frexp(x)[1] - 1, smallest) if x else FLOAT32_MIN


def truncate(x: Fraction, quantum: Fraction) -> Fraction:
    return math.trunc(x / quantum) * quantum


def to_float32(x: Fraction) -> float:
    """Truncated towards zero; infinite from 2 ** 128 on."""
    if abs(x) >= 2**128:
        return math.inf if x > 0 else -math.inf
    floor = x.numerator.bit_length() - x.denominator.bit_length()  # of log2, or one too many
    floor -= abs(x) < Fraction(2) ** floor
    return float(truncate(x, Fraction(2) ** (max(floor, FLOAT32_MIN) - 23)))


def fused_sum(
    a: Sequence[float], b: Sequence[float], c: float, bits: int, smallest: int = FLOAT32_MIN
) -> float:
    """``c + sum(a * b)``; ``smallest``: see ``exponent``, of the type of a and b."""
    pairs = list(zip(a, b, strict=True))
    if not all(map(math.isfinite, [c, *a, *b])):
        total = c
        for x, y in pairs:
            total += x * y
        return total
    terms = [(Fraction(c), exponent(c, FLOAT32_MIN))]
    terms += [
        (Fraction(x) * Fraction(y), exponent(x, smallest) + exponent(y, smallest)) for x, y in pairs
    ]
    quantum = Fraction(2) ** (max(e for _, e in terms) - bits)
    return to_float32(sum((truncate(x, quantum) for x, _ in terms), Fraction(0)))
