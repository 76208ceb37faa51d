"""Draft control in plain Python: decisions fed with given draws, and what a round teaches.

Written from the rules, not from the kernel: beliefs are kept as counts and sums, times as formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

NUM_BINS = 8
STEP, BIAS = 1024, 512  # where a step's draws begin, and the bias of a cost-aware round in step 0


class Draws(Protocol):
    """The variates of one sequence's round, by the index of their first uniform."""

    def uniform(self, index: int) -> float: ...
    def normal(self, index: int, mean: float, variance: float) -> float: ...
    def beta(self, index: int, alpha: float, beta: float) -> float: ...


@dataclass
class Costs:
    fixed: float
    step: float
    lower: float
    verify: float
    row: float

    @property
    def plain(self) -> float:
        return self.lower + self.verify

    def round(self, drafted: int, kept: int) -> float:
        if not drafted:
            return self.plain
        # Nodes whose lower layers run: the root and all that are verified; each step runs those of
        # the node it starts from.
        by_steps = drafted
        behind = max(0, 1 + kept - by_steps)
        return (
            self.fixed + by_steps * self.step + behind * self.lower + self.verify + kept * self.row
        )


@dataclass
class Settings:
    draft_len: int
    threshold: float
    adapt_rate: float
    target_rejection: float
    alpha: float
    beta: float
    bias_mean: float
    bias_var: float
    noise_var: float
    discount: float
    gain_mean: float
    gain_weight: float
    gain_var: float


@dataclass
class Counts:
    """Discounted evidence; a posterior is this on top of the prior."""

    first: float = 0.0
    second: float = 0.0

    def see(self, first: float, second: float) -> None:
        self.first += first
        self.second += second

    def fade(self, discount: float) -> None:
        self.first *= discount
        self.second *= discount


@dataclass
class Control:
    """One sequence, or several that share."""

    kind: str
    s: Settings
    costs: Costs
    acceptance: Counts = field(default_factory=Counts)  # accepted, rejections
    bias: Counts = field(default_factory=Counts)  # judged tokens, sum of residuals
    gain: Counts = field(default_factory=Counts)  # rounds, sum of gains
    bins: list[Counts] = field(default_factory=lambda: [Counts() for _ in range(NUM_BINS)])
    threshold: float = 0.0
    tokens: float = 0.0
    time: float = 0.0
    idle: int = 0

    def __post_init__(self) -> None:
        self.threshold = self.s.threshold

    # --- beliefs

    def acceptance_law(self) -> tuple[float, float]:
        return self.s.alpha + self.acceptance.first, self.s.beta + self.acceptance.second

    def bias_law(self) -> tuple[float, float]:
        precision = 1 / self.s.bias_var + self.bias.first / self.s.noise_var
        shift = self.s.bias_mean / self.s.bias_var + self.bias.second / self.s.noise_var
        return shift / precision, 1 / precision

    def gain_law(self) -> tuple[float, float]:
        weight = self.s.gain_weight + self.gain.first
        mean = (self.s.gain_weight * self.s.gain_mean + self.gain.second) / weight
        return mean, self.s.gain_var / weight

    def next_law(self, confidence: float) -> tuple[float, float]:
        number = bin_of(confidence)
        middle, seen = (number + 0.5) / NUM_BINS, self.bins[number]
        alpha = 2 * middle * self.s.alpha + seen.first
        return alpha, 2 * (1 - middle) * self.s.beta + seen.second

    def rate(self) -> float:
        plain = 1 / self.costs.plain
        return max(self.tokens / self.time, plain) if self.time else plain

    # --- decisions

    def starts(self, limit: int, draws: Draws) -> bool:
        if limit <= 0:
            return False
        return self.kind != "cost-aware" or draws.normal(1, *self.gain_law()) > 0

    def chance(self, confidences: Sequence[float], draws: Draws) -> float:
        bias, chance = draws.normal(BIAS, *self.bias_law()), 1.0
        for confidence in confidences:
            chance *= min(1.0, max(0.0, confidence + bias))
        return chance

    def goes_on(self, confidences: Sequence[float], draws: Draws) -> bool:
        step, last = len(confidences), confidences[-1]
        first = STEP * step
        if self.kind == "fixed":
            return step < self.s.draft_len
        if self.kind in ("threshold", "adaptive-threshold"):
            return last >= self.threshold
        if self.kind == "beta-ts":
            return draws.uniform(first) < draws.beta(first + 1, *self.acceptance_law())
        if self.kind == "calibration-ts":
            theta = last + draws.normal(first + 1, *self.bias_law())
            return draws.uniform(first) < min(1.0, max(0.0, theta))
        value = self.chance(confidences, draws) * draws.beta(first + 1, *self.next_law(last))
        return value > self.rate() * (self.costs.step + self.costs.row)

    def keeps_last(self, confidences: Sequence[float], draws: Draws) -> bool:
        is_probe = len(confidences) == 1 and self.idle > 0
        if self.kind != "cost-aware" or is_probe:
            return True
        price = self.rate() * (self.costs.lower + self.costs.row)
        return self.chance(confidences, draws) >= price

    # --- learning

    def update(
        self, limit: int, drafted: int, kept: int, accepted: int, confidences: Sequence[float]
    ) -> None:
        if accepted < 0:
            return
        judged = [float(i < accepted) for i in range(min(accepted + 1, kept))]
        if kept:
            self._learn_tokens(judged, confidences)
        if self.kind == "cost-aware":
            self._learn_round(limit, drafted, self.costs.round(drafted, kept), accepted + 1)

    def _learn_tokens(self, judged: list[float], confidences: Sequence[float]) -> None:
        if self.kind == "beta-ts":
            self.acceptance.fade(self.s.discount)
            self.acceptance.see(sum(judged), judged.count(0.0))
        if self.kind == "adaptive-threshold":
            moved = self.threshold + self.s.adapt_rate * (
                (1 - self.s.target_rejection) if 0.0 in judged else -self.s.target_rejection
            )
            self.threshold = min(0.98, max(0.02, moved))
        if self.kind in ("calibration-ts", "cost-aware"):
            residuals = [a - s for a, s in zip(judged, confidences, strict=False)]
            self.bias.fade(self.s.discount)
            self.bias.see(len(judged), sum(residuals))
        if self.kind == "cost-aware":
            for seen in self.bins:
                seen.fade(self.s.discount)
            for before, is_accepted in zip(confidences, judged[1:], strict=False):
                self.bins[bin_of(before)].see(is_accepted, 1 - is_accepted)

    def _learn_round(self, limit: int, drafted: int, time: float, tokens: int) -> None:
        self.tokens = self.s.discount * self.tokens + tokens
        self.time = self.s.discount * self.time + time
        self.gain.fade(self.s.discount)
        if drafted:
            self.gain.see(1.0, tokens - time / self.costs.plain)
            self.idle = 0
        elif limit > 0:
            self.idle += 1


def bin_of(confidence: float) -> int:
    return min(NUM_BINS - 1, int(confidence * NUM_BINS))
