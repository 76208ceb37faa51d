"""Judged tokens and their confidence, chains along held-out text, and the estimate."""

from __future__ import annotations

import math

import pytest
import torch

from specrt.device import Device
from specrt.train.eesd.calibration import (
    ExitWatch,
    GumbelRows,
    Judged,
    calibration_losses,
    expected_calibration_error,
    judge,
)
from specrt.train.eesd.evaluate import Estimate, evaluate_exit, step_share
from specrt.train.eesd.module import ExitModule
from specrt.train.evaluate import Acceptance
from specrt.train.features.source import Sample
from specrt.train.head import TargetHead
from specrt.train.losses import FrozenHead, soft_cross_entropy
from tests.train.exit_support import DEEP, exit_config, random_layer
from tests.train.support import HIDDEN, VOCAB, MemorySource, tables

CPU = Device()


def logits(seed: int, rows: int = 50, size: int = 7) -> torch.Tensor:
    return 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


# --- judging --------------------------------------------------------------------------------------


def test_judged_one_by_one() -> None:
    target, draft, noise = logits(0), logits(0) + logits(1), logits(2)
    judged = judge(target, draft, noise)
    for row in range(len(target)):
        law = draft[row].softmax(0)
        best = int(law.argmax())
        assert judged.scores[0, row] == pytest.approx(math.log(law[best]), abs=1e-5)
        assert judged.labels[0, row] == (best == int(target[row].argmax()))
        noisy = (draft[row] + noise[row]).tolist()
        first, second = sorted(noisy)[-1:-3:-1]
        lead = 1.0 / (1.0 + math.exp(second - first))
        assert judged.scores[1, row] == pytest.approx(math.log(lead), abs=1e-5)
        drawn = int((target[row] + noise[row]).argmax())
        assert judged.labels[1, row] == (noisy.index(first) == drawn)
    for labels in judged.labels:
        assert 0 < labels.mean() < 1


def test_noise_is_each_sequences_own() -> None:
    whole = GumbelRows([5, 6, 7], [3, 0, 4], 11, CPU).take(7)
    parts = GumbelRows([5, 6, 7], [3, 0, 4], 11, CPU)
    assert torch.equal(torch.cat([parts.take(n) for n in (1, 4, 2)]), whole)
    assert torch.equal(GumbelRows([7], [4], 11, CPU).take(4), whole[3:])
    assert not torch.equal(GumbelRows([5], [4], 11, CPU).take(4), whole[3:])


def test_noise_is_gumbels() -> None:
    noise = GumbelRows([1], [2000], 50, CPU).take(2000).flatten().double()
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.02)  # 5 standard errors
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.06)


def test_a_watch_sees_every_row() -> None:
    """Whatever the parts the logits come in, and with hits only where asked for."""
    head = TargetHead(tables().head.weight, logits(3, VOCAB, 1)[:, 0], 0.5, 9.0)
    frozen, predicted = FrozenHead(head), logits(1, 30, HIDDEN)
    features = predicted + 0.7 * logits(2, 30, HIDDEN)
    found = []
    for num_rows in (30, 7):
        frozen.num_rows = num_rows
        noise = GumbelRows([8, 9], [10, 20], VOCAB, CPU)
        watch = ExitWatch(30, noise, frozen.counter(), has_hits=num_rows == 30)
        soft_cross_entropy(predicted, features, frozen, watch)
        found.append(watch)
    drawn = GumbelRows([8, 9], [10, 20], VOCAB, CPU).take(30)
    wanted = judge(head.logits(features), head.logits(predicted), drawn)
    for watch in found:
        torch.testing.assert_close(watch.judged.scores, wanted.scores)
        assert torch.equal(watch.judged.labels, wanted.labels)
    assert found[0].hits[0] == wanted.labels[0].sum() and found[1].hits.tolist() == [0, 0, 0]


# --- confidence -----------------------------------------------------------------------------------


def test_loss_is_binary_cross_entropy() -> None:
    random = torch.Generator().manual_seed(4)
    evidence = torch.randn(20, 2, generator=random)
    scores = -torch.rand(2, 20, generator=random) * 3
    labels = (torch.rand(2, 20, generator=random) < 0.5).float()
    slope = torch.tensor([0.7, 1.3])
    got = calibration_losses(evidence, slope, Judged(scores, labels))
    for mode in (0, 1):
        total = 0.0
        for row in range(20):
            c = math.exp(scores[mode, row])
            odds = float(evidence[row, mode]) + float(slope[mode]) * math.log(c / (1 - c))
            s = 1 / (1 + math.exp(-odds))
            total -= math.log(s if labels[mode, row] else 1 - s)
        assert float(got[mode]) == pytest.approx(total, rel=1e-4)


def test_sure_tokens_have_finite_losses() -> None:
    scores = torch.tensor([[0.0, -200.0]] * 2)
    judged = Judged(scores, torch.tensor([[0.0, 1.0]] * 2))
    losses = calibration_losses(torch.zeros(2, 2), torch.ones(2), judged)
    assert losses.tolist() == pytest.approx([2 * math.log(1e6)] * 2, rel=1e-2)


def test_calibration_error() -> None:
    assert expected_calibration_error(torch.zeros(0), torch.zeros(0)) == 0.0
    confidence = torch.tensor([0.95, 0.95, 0.5, 1.0])
    labels = torch.tensor([1.0, 0.0, 1.0, 1.0])
    # The bin of 0.95 and 1.0: 2.9 - 2 = 0.9; that of 0.5: 0.5 - 1.
    assert expected_calibration_error(confidence, labels) == pytest.approx((0.9 + 0.5) / 4)


# --- held-out chains ------------------------------------------------------------------------------


def test_chains_are_those_of_every_position() -> None:
    """Counted from every root by itself, for a target and an exit of two tokens."""
    depth, head = 3, TargetHead(tables().head.weight[:2])
    model = ExitModule(exit_config(2)).requires_grad_(False)
    model.model.load_state_dict(random_layer())
    random = torch.Generator().manual_seed(5)
    samples, wanted = [], [[0] * depth, [0] * depth]
    right = []
    for length in (1, 2, 30, 25):
        features = torch.randn(length, 3 * HIDDEN, generator=random)
        mask = torch.rand(length, generator=random) < 0.8
        samples.append(Sample(torch.zeros(length, dtype=torch.int64), mask, features))
        _, hidden, feature = features.chunk(3, -1)
        guessed = head.logits(model(hidden[None]).normed[0]).argmax(-1)
        hits = guessed == head.logits(feature).argmax(-1)
        right += [bool(hits[t]) for t in range(length - 1) if mask[t + 1]]
        for root in range(length - 1):
            for level in range(depth):
                token = root + level + 1
                if token >= length or not mask[token]:
                    break
                wanted[0][level] += 1
                if not hits[token - 1]:
                    break
                wanted[1][level] += 1
    source = MemorySource(samples)
    report = evaluate_exit(model, 1, head, source, range(4), device=CPU, depth=depth, seed=0)
    assert [list(report.acceptance.proposed), list(report.acceptance.accepted)] == wanted
    assert 0 < wanted[1][-1] < wanted[1][0] < wanted[0][0] == len(right)
    assert 0.2 < report.sampled_rate < 0.9
    # The head is untrained, so the confidence is the exit's own probability.
    assert all(0 < error < 1 for error in report.calibration_error)


def test_no_held_out_data() -> None:
    model = ExitModule(exit_config(1))
    nothing = MemorySource([])
    report = evaluate_exit(model, 0, tables().head, nothing, [], device=CPU, depth=2, seed=0)
    assert report.acceptance.tau == 1.0 and report.calibration_error == (0.0, 0.0)


# --- the estimate ---------------------------------------------------------------------------------


def test_share_of_a_step() -> None:
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    head = VOCAB * 32
    assert step_share(DEEP, 2) == pytest.approx((3 * layer + head) / (4 * layer + head))


def test_the_best_chain_is_chosen() -> None:
    share = step_share(DEEP, 1)
    good = Acceptance(proposed=(100, 90, 80), accepted=(90, 80, 8), num_sequences=1)
    best = Estimate.make(DEEP, 1, good)
    taus = (1.0, 1.9, 2.7, 2.78)
    speedups = [tau / (1 + k * share) for k, tau in enumerate(taus)]
    assert best.depth == speedups.index(max(speedups)) == 2
    assert best.speedup == pytest.approx(max(speedups))
    assert best.tau == pytest.approx(taus[best.depth])
    poor = Acceptance(proposed=(100,), accepted=(10,), num_sequences=1)
    assert Estimate.make(DEEP, 1, poor) == Estimate(share, 0, 1.0, 1.0)
