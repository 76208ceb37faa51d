"""Both losses against one position at a time, and which positions count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from specrt.train import losses
from specrt.train.head import TargetHead
from specrt.train.losses import FrozenHead, counted_positions, draft_losses

ROWS, HIDDEN, VOCAB = 37, 16, 23
HEADS = [{}, {"scale": 0.3}, {"cap": 2.0}, {"bias": torch.arange(VOCAB) / 9, "scale": 2, "cap": 9}]


def naive(
    predicted: torch.Tensor,
    regressed: torch.Tensor,
    features: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | float = 0.0,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    def logits(row: torch.Tensor) -> torch.Tensor:
        scaled = (head @ row + bias) * scale
        return scaled if cap is None else cap * torch.tanh(scaled / cap)

    regression = classification = torch.zeros(())
    for p, r, f in zip(predicted, regressed, features, strict=True):
        difference = (r - f).abs()
        smooth = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5)
        regression = regression + smooth.sum() / HIDDEN
        law = functional.softmax(logits(f), dim=0)
        classification = classification - (law * functional.log_softmax(logits(p), dim=0)).sum()
    return regression, classification


@pytest.fixture
def rows() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    made = [2 * torch.randn(ROWS, HIDDEN, generator=generator) for _ in range(3)]
    return (*made, torch.randn(VOCAB, HIDDEN, generator=generator))


@pytest.mark.parametrize("change", HEADS, ids=lambda change: " ".join(change) or "plain")
@pytest.mark.parametrize("num_rows", [ROWS, 5, 1])
def test_values_and_gradients(
    rows: tuple[torch.Tensor, ...], num_rows: int, change: dict[str, Any]
) -> None:
    predicted, regressed, features, head = rows
    leaves = [predicted.clone().requires_grad_() for _ in range(2)]
    others = [regressed.clone().requires_grad_() for _ in range(2)]
    frozen = FrozenHead(TargetHead(head, **change))
    frozen.num_rows = num_rows
    ours = draft_losses(leaves[0], others[0], features, frozen)
    wanted = naive(leaves[1], others[1], features, head, **change)
    torch.testing.assert_close(ours.regression, wanted[0])
    torch.testing.assert_close(ours.classification, wanted[1])
    (0.7 * ours.regression + 0.3 * ours.classification).backward()
    (0.7 * wanted[0] + 0.3 * wanted[1]).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    torch.testing.assert_close(others[0].grad, others[1].grad)


def test_hits_are_of_the_targets_best(rows: tuple[torch.Tensor, ...]) -> None:
    predicted, regressed, features, head = rows
    predicted = features + 0.5 * predicted  # so that some are hit
    best = (features @ head.T).argmax(1, keepdim=True)
    top = (predicted @ head.T).topk(3).indices
    wanted = [float((top[:, :k] == best).any(1).sum()) for k in (1, 2, 3)]
    assert 0 < wanted[0] < wanted[2] < ROWS
    losses = draft_losses(predicted, regressed, features, FrozenHead(TargetHead(head)))
    assert losses.hits.tolist() == wanted


def test_ties_go_to_the_earlier_token() -> None:
    head = torch.tensor([[1.0], [2.0], [2.0], [2.0], [2.0]])
    predicted = torch.ones(1, 1)  # tokens 1 to 4 tie
    head_for = torch.eye(5)
    for token, hits in [
        (1, [1, 1, 1]),
        (2, [0, 1, 1]),
        (3, [0, 0, 1]),
        (4, [0, 0, 0]),
        (0, [0] * 3),
    ]:
        logits = predicted @ head.T
        assert losses._hits(logits, head_for[token].argmax()[None]).tolist() == hits


def test_hits_can_be_left_out(rows: tuple[torch.Tensor, ...]) -> None:
    predicted, regressed, features, head = rows
    losses = draft_losses(
        predicted, regressed, features, FrozenHead(TargetHead(head)), has_hits=False
    )
    assert losses.hits.tolist() == [0, 0, 0]


def test_no_position() -> None:
    empty, head = torch.zeros(0, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN)
    sums = draft_losses(empty, empty, empty.detach(), FrozenHead(TargetHead(head)))
    assert (sums.regression + sums.classification).item() == 0.0
    (sums.regression + sums.classification).backward()


def test_position_counts_for_the_token_two_on() -> None:
    mask = torch.tensor([False, False, False, True, True, False])
    assert counted_positions(mask).tolist() == [False, True, True, False]
