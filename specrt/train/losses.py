"""Soft cross entropy behind a frozen head, and the losses of FSPAD around it.

The two losses of partial alignment distillation are arXiv 2408.15562's (section 3.3). The pair
(f_t, e_{t+1}) predicts f_{t+1} and the logits of token t + 2. So position t counts where token
t + 2 is one to be predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from specrt.train.device import TrainDevice
from specrt.train.head import TargetHead

TOP = 3

Watch = Callable[[slice, torch.Tensor, torch.Tensor], None]
"""Sees logits while they are at hand: which rows, the target's and the drafter's ``[n, V]`` float32
of them, scaled and capped; it must not change them."""


class Losses(NamedTuple):
    """Sums over the counted positions."""

    regression: torch.Tensor
    """``[]`` float32: SmoothL1(r_t, f_{t+1}), each the mean over H."""
    classification: torch.Tensor
    """``[]`` float32, nats: cross entropy of the drafter's law against the target's."""
    hits: torch.Tensor
    """``[3]`` float32, zeros where not asked for: positions where the target's likeliest
    token is among the drafter's 1, 2, 3 best."""


def counted_positions(loss_mask: torch.Tensor) -> torch.Tensor:
    """Which pairs count, for tokens whose ``loss_mask`` ``[..., n]`` says "to be predicted".

    Returns:
        ``[..., max(n - 2, 0)]`` bool: position t for token t + 2.
    """
    return loss_mask[..., 2:]


class FrozenHead:
    """The target's LM head, and how the losses behind it are computed.

    Args:
        target: the head, where training runs.
        device: that place.
    """

    def __init__(self, target: TargetHead, device: TrainDevice | None = None) -> None:
        device = device or TrainDevice()
        self.target, self.weight = target, target.weight
        self.num_rows = max(1, device.num_logits // len(self.weight))
        """Whose logits are made at a time."""
        self.divergence = device.fused(_divergence_behind(target))

    def counter(self) -> HitCounter:
        """Of hits, from nought."""
        return HitCounter(self.weight.new_zeros(TOP, dtype=torch.float32))


def draft_losses(
    predicted: torch.Tensor,
    regressed: torch.Tensor,
    features: torch.Tensor,
    head: FrozenHead,
    *,
    has_hits: bool = True,
) -> Losses:
    """Both losses over N counted positions.

    Args:
        predicted: ``[N, H]``: p_t.
        regressed: ``[N, H]``: r_t.
        features: ``[N, H]``: the target's f_{t+1}.
        head: the target's.
        has_hits: count hits too, which takes as long as a tenth of the losses.
    """
    features = features.float()
    regression = functional.smooth_l1_loss(regressed.float(), features, reduction="none")
    hits = head.counter()
    watch = hits if has_hits else None
    classification = soft_cross_entropy(predicted, features, head, watch)
    return Losses(regression.mean(-1).sum(), classification, hits.sums)


def soft_cross_entropy(
    predicted: torch.Tensor,
    features: torch.Tensor,
    head: FrozenHead,
    watch: Watch | None = None,
) -> torch.Tensor:
    """The drafter's law against the target's, without ever holding all logits.

    Args:
        predicted: ``[N, H]``: what the drafter gives to the head.
        features: ``[N, H]``: what the target gives to it.
        head: the target's.
        watch: called with the logits of every part of the rows, in order.

    Returns:
        ``[]`` float32, nats: the sum over the rows.
    """
    loss: torch.Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        predicted, features, head, watch
    )
    return loss


class HitCounter:
    """A :data:`Watch` that counts how often the target's likeliest token is among the best.

    Args:
        sums: ``[3]`` float32 zeros: rows with it among the drafter's 1, 2, 3 best.
    """

    def __init__(self, sums: torch.Tensor) -> None:
        self.sums = sums

    def __call__(self, rows: slice, target: torch.Tensor, draft: torch.Tensor) -> None:
        self.sums += _hits(draft, target.argmax(-1))


class _HeadLoss(torch.autograd.Function):
    """The gradient is made along with the loss, while a part's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        predicted: torch.Tensor,
        features: torch.Tensor,
        head: FrozenHead,
        watch: Watch | None,
    ) -> torch.Tensor:
        gradient = torch.empty_like(predicted)
        weight, made = head.weight, head.target
        loss = weight.new_zeros((), dtype=torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            for start in range(0, len(predicted), head.num_rows):
                part = slice(start, start + head.num_rows)
                target = made.product(features[part])
                draft = made.product(predicted[part])
                if watch is not None:
                    watch(part, made.changed(target).float(), made.changed(draft).float())
                gained, by_product = head.divergence(target, draft)
                loss -= gained
                gradient[part] = by_product @ weight
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None, None


def _divergence_behind(
    head: TargetHead,
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Of what a head's products ``[n, V]`` are, the target's and the drafter's: the log-likelihood
    of the target's law under the drafter's, summed over the rows, ``[]`` float32, and its
    negative's gradient by the drafter's products, in their dtype.

    Laws are float32, each made in one pass over the products' own dtype.
    """

    def _divergence(target: torch.Tensor, draft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head.changed(draft)
        law = head.changed(target).softmax(-1, torch.float32)
        log_law = logits.log_softmax(-1, torch.float32)
        gained = torch.dot(law.view(-1), log_law.view(-1))
        by_logits = log_law.exp_() - law
        if logits is not draft:
            by_logits = by_logits * head.by_product(logits)
        return gained, by_logits.to(draft.dtype)

    return _divergence


def _hits(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """``[3]``: rows whose ``wanted`` token is among the 1, 2, 3 best (the earlier one on ties)."""
    value = logits.gather(1, wanted[:, None])
    tokens = torch.arange(logits.shape[1], out=wanted.new_empty(logits.shape[1]))
    is_earlier = tokens < wanted[:, None]
    rank = ((logits > value) | ((logits == value) & is_earlier)).sum(1)
    return torch.stack([(rank < k).sum() for k in range(1, TOP + 1)]).float()
