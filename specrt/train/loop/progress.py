"""How far a run is, and what its steps gave."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from specrt.device import Posted


@dataclass
class Progress:
    """How far a run is; saved with its state."""

    step: int = 0
    num_tokens: int = 0
    num_flop: int = 0
    """Of matrix products, as :meth:`specrt.train.task.TrainTask.num_flop` counts them."""
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Taken:
    """A step whose figures may be on their way to the host yet."""

    number: int
    """From 1."""
    epoch: int
    indices: list[int]
    """Of its sequences."""
    num_tokens: int
    num_flop: int
    rate: float
    is_logged: bool
    figures: Posted
    """``[K + G]`` float32: means of the whole step's losses and hits, then the norms of its
    gradient's G groups before they were clipped, which would hide an infinite one."""


@dataclass(frozen=True)
class Settled:
    """A step and what it gave."""

    taken: Taken
    means: list[float]
    norm: float
    """Of the gradient."""

    @classmethod
    def read(cls, taken: Taken, num_groups: int) -> Settled:
        """Wait for a step's figures."""
        figures = taken.figures.read().tolist()
        num_means = len(figures) - num_groups
        return cls(taken, figures[:num_means], math.hypot(*figures[num_means:]))

    @property
    def is_finite(self) -> bool:
        """Whether all of it is."""
        return all(map(math.isfinite, self.means)) and math.isfinite(self.norm)


def speed(work: Progress | Taken, seconds: float, peak: float | None) -> dict[str, float]:
    """Tokens a second and, where it is known, the share of the peak of its matrix products.

    Args:
        work: what was done, by all processes.
        seconds: that it took.
        peak: FLOP a second, of all processes.
    """
    seconds = max(seconds, 1e-9)
    rates = {"tokens_per_second": work.num_tokens / seconds}
    if peak is not None:
        rates["peak_share"] = work.num_flop / seconds / peak
    return rates
