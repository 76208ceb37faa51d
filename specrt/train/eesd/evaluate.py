"""How good an exit is: chains on held-out sequences, its confidence, and what that may be worth.

On text the target has written greedily the chains are exact, whatever their depth: the exit's keys
and values come from the target's own layers, so what is drafted at a position depends on the true
tokens before it and on nothing that was guessed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.models.layouts import layer_shapes
from specrt.train.batches import collate_exits
from specrt.train.eesd.calibration import (
    MODES,
    GumbelRows,
    Judged,
    confidence_logits,
    expected_calibration_error,
    judge,
)
from specrt.train.eesd.module import ExitModule
from specrt.train.evaluate import Acceptance, ChainCounter, spread
from specrt.train.features.source import FeatureSource
from specrt.train.head import TargetHead

_ROWS = 256  # logits at a time


@dataclass(frozen=True)
class ExitReport:
    """What held-out sequences say of an exit."""

    acceptance: Acceptance
    """Of greedy chains."""
    sampled_rate: float
    """Share of positions where exit and target draw the same token with the same noise at
    temperature 1."""
    calibration_error: tuple[float, float]
    """Expected calibration error of the confidence, greedy and sampled."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.acceptance.as_dict(),
            "sampled_acceptance_rate": self.sampled_rate,
            "calibration_error": dict(zip(MODES, self.calibration_error, strict=True)),
        }


@dataclass(frozen=True)
class Estimate:
    """What an exit may be worth where verifying some rows takes as long as one.

    That holds where weights are streamed from memory and few rows are run. A plain step is 1; a
    draft step is ``step_share``, what it streams of a plain step's weights: N + 1 layers and the
    head of L layers and the head. A round that drafts k tokens and verifies takes 1 + k of those,
    for each drafted token's first N layers are run once.
    """

    step_share: float
    depth: int
    """k of the best chain, 0 where drafting does not pay."""
    tau: float
    speedup: float
    """tau / (1 + k * step_share)"""

    @classmethod
    def make(cls, target: ModelConfig, exit_layer: int, acceptance: Acceptance) -> Estimate:
        """The best chain no deeper than those tried."""
        share = step_share(target, exit_layer)
        speedups = [tau / (1.0 + depth * share) for depth, tau in enumerate(acceptance.taus)]
        best = max(range(len(speedups)), key=speedups.__getitem__)
        return cls(share, best, acceptance.taus[best], speedups[best])


def step_share(target: ModelConfig, exit_layer: int) -> float:
    """Weights of N + 1 layers and the head over those of all layers and the head."""
    layer = sum(math.prod(shape) for shape in layer_shapes(target).values())
    head = target.vocab_size * target.hidden_size
    return ((exit_layer + 1) * layer + head) / (target.num_layers * layer + head)


@torch.no_grad()
def evaluate_exit(
    model: ExitModule,
    column: int,
    head: TargetHead,
    source: FeatureSource,
    indices: Sequence[int],
    *,
    device: Device,
    depth: int,
    seed: int,
) -> ExitReport:
    """Draft from every position of held-out sequences.

    Args:
        model: the exit.
        column: which of the source's taps it reads.
        head: the target's, where and in the dtype the exit computes.
        source: of the sequences.
        indices: the held-out ones; at most 64 of them are used, evenly spaced.
        device: where the exit and the head are.
        depth: of the chains.
        seed: of the noise for the sampled mode.
    """
    counter = ChainCounter(depth)
    judged, confidences = [], []
    for index in spread(indices):
        batch = collate_exits(source, [index], seed=seed, epoch=0, device=device)
        output = model(batch.states[:, :, column])
        count = batch.states.shape[1]
        noise = GumbelRows(batch.draw_seeds, [count], len(head.weight), device)
        found = _judged(output.normed[0], batch.states[0, :, -1], head, noise)
        is_counted = device.there(batch.is_counted[0])
        is_hit = found.labels[0] > 0
        counter.add([is_hit[level:] for level in range(depth)], is_counted)
        logits = confidence_logits(output.evidence[0], output.slope, found.scores)
        judged.append(found.labels[:, is_counted])
        confidences.append(logits.sigmoid()[:, is_counted])
    if not judged:
        return ExitReport(counter.acceptance, 0.0, (0.0, 0.0))
    labels, confidence = torch.cat(judged, 1), torch.cat(confidences, 1)
    greedy, sampled = map(expected_calibration_error, confidence, labels)
    rate = float(labels[1].mean()) if labels.shape[1] else 0.0
    return ExitReport(counter.acceptance, rate, (greedy, sampled))


def _judged(
    normed: torch.Tensor, features: torch.Tensor, head: TargetHead, noise: GumbelRows
) -> Judged:
    """Every row of one sequence, a part of the logits at a time."""
    parts = [
        judge(head.logits(target), head.logits(draft), noise.take(len(draft)))
        for draft, target in zip(normed.split(_ROWS), features.split(_ROWS), strict=True)
    ]
    scores, labels = zip(*parts, strict=True)
    return Judged(torch.cat(scores, 1), torch.cat(labels, 1))
