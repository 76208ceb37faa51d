"""What drafting and verifying take, from which it follows how much of them pays."""

from __future__ import annotations

import math
from dataclasses import dataclass

GPU_SLOPE = 0.003
"""Cost of a further row, in rows, on a GPU: weights are streamed once for up to 128 of them."""

_LEAST_MS = 1e-6  # a coarse clock may say that nothing took any time


class RoundCost:
    """What verifying n rows costs relative to one row, measured as rounds go by.

    A line through the last few dozen rounds: one row's time, and the time of each further row.
    Where all rounds were of one size, the line's slope is what it has been in the long run. (A
    table by size was tried: on a noisy machine its entries contradict each other for hundreds of
    rounds. So was one row's time from plain rounds alone: it is stale when the machine's speed has
    changed.) Before there are measurements memory traffic is taken to dominate, as it does for a
    model larger than the caches. Measured times move trees, never tokens.

    Args:
        slope: cost of a further row, in rows, before anything is measured.
        memory: weight of the past, a round.
    """

    _STIFFNESS = 30.0  # of the slope, in the units of x²: less than one round of eight rows
    _SLOW = 0.02

    def __init__(self, slope: float = 0.08, memory: float = 0.97) -> None:
        self._slope = slope
        self._memory = memory
        self._one_ms: float | None = None
        self._row_ms = 0.0
        self._sums = [0.0] * 5  # of 1, x, x², y, xy, where x = further rows and y = ms
        self._seen_once: set[int] = set()

    @property
    def one_ms(self) -> float | None:
        """Time of a round that verifies one row; None before any was measured."""
        return self._one_ms

    def observe(self, num_rows: int, ms: float) -> None:
        """Record the time of one round, drafting excluded."""
        if num_rows not in self._seen_once:
            # The first round of a size also captures its graph.
            self._seen_once.add(num_rows)
            return
        ms, x = max(ms, _LEAST_MS), num_rows - 1
        if self._one_ms is not None:
            # Outliers (a preempted thread) are capped so that one cannot turn drafting on or off.
            ms = min(ms, 2.0 * (self._one_ms + x * self._row_ms))
        seen = (1.0, x, x * x, ms, x * ms)
        self._sums = [self._memory * old + new for old, new in zip(self._sums, seen, strict=True)]
        self._fit()

    def relative(self, num_rows: int) -> float:
        """Cost of ``num_rows`` rows over that of one row, at least 1."""
        slope = self._slope if self._one_ms is None else self._row_ms / self._one_ms
        return 1.0 + slope * max(0, num_rows - 1)

    def _fit(self) -> None:
        """Least squares of y = one + row * x, with row held near slope * one."""
        count, x, xx, y, xy = self._sums
        slope, stiff = self._slope, self._STIFFNESS
        a, b, c = count + stiff * slope * slope, x - stiff * slope, xx + stiff
        determinant = a * c - b * b
        one, row = (c * y - b * xy) / determinant, (a * xy - b * y) / determinant
        # Noise may tilt the line past what can be; then it goes through the mean at that tilt.
        tilt = min(1.0, max(0.0, row / one if one > 0 else 1.0))
        if one <= 0 or not 0.0 <= row <= one:
            one = y / (count + tilt * x)
            row = tilt * one
        self._one_ms, self._row_ms = one, row
        self._slope += self._SLOW * (tilt - self._slope)


@dataclass(frozen=True)
class DraftCosts:
    """Times of a round's pieces in milliseconds; a plain round takes ``lower + verify``.

    A round that drafts n > 0 tokens and verifies k of them takes ``fixed + n * step + verify +
    k * row``, and ``lower`` for the last token if it is verified: the steps have run the lower
    layers of all others.

    Raises:
        ValueError: a time is negative or no number, or a plain round takes none.
    """

    fixed: float
    """What a drafted round has on top of a plain one, however short."""
    step: float
    """One draft step: lower layers, exit and head."""
    lower: float
    """The lower layers of one node."""
    verify: float
    """Upper layers, head and acceptance of one row."""
    row: float
    """Each further row verified."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            fits = math.isfinite(value) and value >= 0.0
            if not fits:
                raise ValueError(f"{name}: expected milliseconds >= 0, got {value!r}")
        plain = self.lower + self.verify
        if not plain > 0.0:
            raise ValueError(f"lower, verify: expected a plain round's time > 0, got {plain!r}")

    def plain_ms(self) -> float:
        """Time of a round that drafts nothing."""
        return self.lower + self.verify

    def round_ms(self, drafted: int, kept: int) -> float:
        """Time of a round that drafts ``drafted`` tokens and verifies ``kept`` of them."""
        if drafted == 0:
            return self.plain_ms()
        last = self.lower if kept == drafted else 0.0
        return self.fixed + drafted * self.step + last + self.verify + kept * self.row
