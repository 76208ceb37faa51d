"""How sure an exit should be of a drafted token: judged tokens, their confidence, its loss.

The paper (arXiv 2406.03853, Calibration-TS) has a head that predicts acceptance; how it is made and
trained is our reading. The confidence of a drafted token is

    s = sigmoid(weight[m] . zn + bias[m] + slope[m] * logit(exp(score)))

with the exit's normed state zn and its own score of the token. Mode m = 0: the exit's likeliest
token, scored by its log-probability, counts where it is the target's likeliest. Mode m = 1: both
draw with the same Gumbel noise at temperature 1; the score is the best one's log-softmax over the
best two, and it counts where both drew the same.

N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from specrt.device import Device
from specrt.draft.eesd.checkpoint import NUM_MODES
from specrt.train.losses import HitCounter

MODES = ("greedy", "sampled")
"""What the rows of the calibration head are for."""

_CLIP = 1e-6  # of a probability, before its log-odds
_NUM_BINS = 15
_LEAST_UNIFORM = 2.0**-25  # below what float32 uniforms reach, but for zero


class Judged(NamedTuple):
    """Drafted tokens, by mode."""

    scores: torch.Tensor
    """``[2, N]`` float32, <= 0: what the exit thinks of its token."""
    labels: torch.Tensor
    """``[2, N]`` float32: 1 where the target would accept it."""


class GumbelRows:
    """Rows of Gumbel noise, each sequence's from a seed of its own.

    Args:
        seeds: of the sequences.
        counts: rows of each.
        size: V.
        device: where the noise is made; another kind of device makes other numbers.
    """

    def __init__(
        self, seeds: Sequence[int], counts: Sequence[int], size: int, device: Device
    ) -> None:
        self._left = list(zip(seeds, counts, strict=True))[::-1]
        self._size = size
        self._device, self._random = device, torch.Generator(device.place)
        self._num_left = 0

    def take(self, num_rows: int) -> torch.Tensor:
        """The next ``num_rows`` rows, ``[num_rows, V]`` float32."""
        noise = self._device.empty(num_rows, self._size)
        start = 0
        while start < num_rows:
            while not self._num_left:
                seed, self._num_left = self._left.pop()
                self._random.manual_seed(seed)
            end = min(num_rows, start + self._num_left)
            noise[start:end].uniform_(generator=self._random)
            self._num_left -= end - start
            start = end
        return noise.clamp_min_(_LEAST_UNIFORM).log_().neg_().log_().neg_()


def judge(target: torch.Tensor, draft: torch.Tensor, noise: torch.Tensor) -> Judged:
    """What the exit would draft at every position, and whether the target would accept it.

    Args:
        target, draft: logits ``[N, V]``.
        noise: ``[N, V]``: what both draw with.
    """
    best = draft.max(-1)
    is_best = best.indices == target.argmax(-1)
    drawn = (draft + noise).topk(2)
    is_drawn = drawn.indices[:, 0] == (target + noise).argmax(-1)
    lead = drawn.values[:, 0] - drawn.values[:, 1]
    scores = torch.stack([best.values - draft.logsumexp(-1), functional.logsigmoid(lead)])
    return Judged(scores, torch.stack([is_best, is_drawn]).float())


class ExitWatch:
    """A :data:`specrt.train.losses.Watch` that judges every row, and counts hits where asked.

    Args:
        num_rows: N.
        noise: of the rows.
        hits: where the logits are.
        has_hits: count hits too.
    """

    def __init__(
        self, num_rows: int, noise: GumbelRows, hits: HitCounter, *, has_hits: bool
    ) -> None:
        self._noise, self._has_hits = noise, has_hits
        self._hits = hits
        empty = hits.sums.new_empty(NUM_MODES, num_rows)
        self.judged = Judged(empty, torch.empty_like(empty))

    def __call__(self, rows: slice, target: torch.Tensor, draft: torch.Tensor) -> None:
        if self._has_hits:
            self._hits(rows, target, draft)
        found = judge(target, draft, self._noise.take(len(target)))
        self.judged.scores[:, rows], self.judged.labels[:, rows] = found

    @property
    def hits(self) -> torch.Tensor:
        """``[3]`` float32, as :class:`HitCounter` has them."""
        return self._hits.sums


def confidence_logits(
    evidence: torch.Tensor, slope: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """The log-odds of the confidence, ``[2, N]`` float32.

    Args:
        evidence: ``[N, 2]``: weight . zn + bias.
        slope: ``[2]``
        scores: ``[2, N]``, of :class:`Judged`.
    """
    return evidence.T.float() + slope[:, None] * scores.exp().logit(_CLIP)


def calibration_losses(evidence: torch.Tensor, slope: torch.Tensor, judged: Judged) -> torch.Tensor:
    """Binary cross entropy of the confidence by mode, ``[2]`` nats, summed over the rows."""
    logits = confidence_logits(evidence, slope, judged.scores)
    losses = functional.binary_cross_entropy_with_logits(logits, judged.labels, reduction="none")
    return losses.sum(-1)


def expected_calibration_error(confidence: torch.Tensor, labels: torch.Tensor) -> float:
    """How far confidence is from the share accepted: the mean over 15 bins of equal width.

    Args:
        confidence: ``[N]`` in 0..1.
        labels: ``[N]``: 1 where accepted.
    """
    if not len(confidence):
        return 0.0
    bins = (confidence * _NUM_BINS).long().clamp_(0, _NUM_BINS - 1)
    gaps = torch.zeros(_NUM_BINS, dtype=torch.float64, device=confidence.device)
    gaps.index_add_(0, bins, (confidence - labels).double())
    return float(gaps.abs().sum()) / len(confidence)
