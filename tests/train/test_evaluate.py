"""Chains along held-out sequences against chains drafted one by one with the plain forward."""

from __future__ import annotations

import pytest
import torch

from specrt.draft.fspad.checkpoint import ARCHS
from specrt.train import evaluate
from specrt.train.evaluate import Acceptance, chain_acceptance
from specrt.train.features.source import Sample
from specrt.train.fspad.module import DraftModel
from specrt.train.head import TargetHead, TargetTables
from tests.train.support import HIDDEN, VOCAB, MemorySource, draft_config, random_model, tables

DEPTH = 4


def naive_counts(model: DraftModel, target: TargetTables, sample: Sample) -> list[list[int]]:
    """Proposed and accepted by depth, each chain by itself from its own inputs."""
    token_ids, mask, features = sample
    best = target.head.logits(features).argmax(1)
    counts = [[0] * DEPTH, [0] * DEPTH]
    for root in range(len(token_ids) - 2):
        fed = features[: root + 1]
        for depth in range(1, DEPTH + 1):
            token = root + depth + 1  # the one to be guessed
            if token >= len(token_ids) or not mask[token]:
                break
            counts[0][depth - 1] += 1
            pairs = fed[None], target.embed[token_ids[1 : root + depth + 1]][None]
            predicted, regressed = model(*pairs)
            guessed = int(target.draft_head.logits(predicted[0, -1:]).argmax())
            if target.token_ids is not None:
                guessed = int(target.token_ids[guessed])
            if guessed != best[token - 1]:
                break
            counts[1][depth - 1] += 1
            fed = torch.cat([fed, regressed[0, -1:]])
    return counts


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("rows", "kept"), [(256, None), (3, None), (256, [1, 0])])
def test_agrees_with_chains_one_by_one(
    arch: str, rows: int, kept: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "_ROWS", rows)
    generator = torch.Generator().manual_seed(5)
    target = tables()
    model = random_model(arch)
    samples = []
    for length in (2, 3, 5, 40, 33):
        token_ids = torch.randint(0, VOCAB, (length,), generator=generator)
        features = torch.randn(length, HIDDEN, generator=generator)
        mask = torch.rand(length, generator=generator) < 0.9
        samples.append(Sample(token_ids, mask, features))
    # Of two tokens an untrained drafter guesses half, so some chains get to the end.
    bias = torch.tensor([0.3, -0.3])  # or leaving it out would not show
    ids = None if kept is None else torch.tensor(kept)
    small = TargetTables(target.embed, TargetHead(target.head.weight[:2], bias), ids)
    wanted = [[0] * DEPTH, [0] * DEPTH]
    for sample in samples:
        for total, counts in zip(wanted, naive_counts(model, small, sample), strict=True):
            total[:] = [a + b for a, b in zip(total, counts, strict=True)]
    got = chain_acceptance(model, small, MemorySource(samples), range(len(samples)), DEPTH)
    assert [list(got.proposed), list(got.accepted)] == wanted
    assert got.accepted[-1] > 0 and got.accepted[0] < got.proposed[0]  # both happened


def test_tau_is_the_expected_length_of_a_round() -> None:
    acceptance = Acceptance(proposed=(10, 5, 0), accepted=(5, 2, 0), num_sequences=1)
    assert acceptance.rates == (0.5, 0.4, 0.0)
    assert acceptance.tau == pytest.approx(1 + 0.5 + 0.5 * 0.4)


def test_takes_a_spread_of_many_sequences() -> None:
    model = DraftModel(draft_config()).requires_grad_(False)
    sample = Sample(torch.arange(4), torch.ones(4, dtype=torch.bool), torch.randn(4, HIDDEN))
    read: list[int] = []

    class Source(MemorySource):
        def batch(self, indices):  # type: ignore[no-untyped-def]
            read.extend(indices)
            return [sample]

    got = chain_acceptance(model, tables(), Source([]), range(1000, 1640), 1)
    assert read == list(range(1000, 1640, 10)) and got.num_sequences == 64


def test_no_held_out_data() -> None:
    model = DraftModel(draft_config()).requires_grad_(False)
    got = chain_acceptance(model, tables(), MemorySource([]), [], 3)
    assert (got.rates, got.tau, got.num_sequences) == ((0.0, 0.0, 0.0), 1.0, 0)
