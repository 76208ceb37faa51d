"""Order, padding and noise of batches."""

from __future__ import annotations

import numpy as np
import torch

from specrt.device import Device
from specrt.train.batches import BatchPlan, collate, feature_noise
from specrt.train.features.source import Sample
from tests.train.support import MemorySource, make_source

CPU = Device()


def test_every_sequence_once_an_epoch() -> None:
    indices = list(range(3, 47))
    plan = BatchPlan(indices, [0] * 50, 4, seed=0)
    assert plan.steps_per_epoch == 11
    for epoch in range(2):
        steps = [plan.step(11 * epoch + number) for number in range(11)]
        assert {number for number, _ in steps} == {epoch}
        assert sorted(index for _, batch in steps for index in batch) == indices


def test_what_fills_no_batch_changes_with_the_epoch() -> None:
    plan = BatchPlan(range(10), [0] * 10, 4, seed=0)
    seen = [{i for step in (0, 1) for i in plan.step(2 * epoch + step)[1]} for epoch in range(8)]
    assert {len(used) for used in seen} == {8}
    assert set.union(*seen) == set(range(10)) and len(set(map(frozenset, seen))) > 1


def test_order_is_a_function_of_seed_and_step() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 100).tolist()
    one, other = BatchPlan(range(100), lengths, 8, 1), BatchPlan(range(100), lengths, 8, 2)
    forwards = [one.step(step) for step in range(30)]
    again = BatchPlan(range(100), lengths, 8, 1)
    assert [again.step(step) for step in reversed(range(30))] == forwards[::-1]
    assert [other.step(step) for step in range(30)] != forwards
    assert forwards[0][1] != forwards[12][1]  # the first of another epoch


def test_batches_have_like_lengths() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 1000)
    plan = BatchPlan(range(1000), lengths.tolist(), 8, seed=0)
    batches = [lengths[plan.step(step)[1]] for step in range(plan.steps_per_epoch)]
    padded = sum(8 * batch.max() for batch in batches)
    assert sum(batch.sum() for batch in batches) / padded > 0.94
    means = np.array([batch.mean() for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25  # and come in no order


def test_fewer_sequences_than_a_batch() -> None:
    plan = BatchPlan([5, 6], [9] * 7, 4, seed=0)
    assert (plan.batch_size, plan.steps_per_epoch) == (2, 1)


def test_pairs_are_shifted_as_the_method_says() -> None:
    def sample(length: int) -> Sample:
        mask = torch.arange(length) >= length - 2
        return Sample(
            100 + torch.arange(length), mask, torch.arange(length).float()[:, None].expand(-1, 2)
        )

    source = MemorySource([sample(6), sample(4), sample(2)], hidden_size=2)
    batch = collate(source, [0, 1, 2], noise=0.0, seed=0, epoch=0, device=CPU)
    assert batch.inputs[..., 0].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0], [0] * 4]
    assert batch.targets[..., 1].tolist() == [[1, 2, 3, 4], [1, 2, 0, 0], [0] * 4]
    assert batch.next_tokens.tolist() == [[101, 102, 103, 104], [101, 102, 0, 0], [0] * 4]
    wanted = [[False, False, True, True], [True, True, False, False], [False] * 4]
    assert batch.is_counted.tolist() == wanted
    assert batch.num_tokens == 12


def test_noise_is_uniform_and_scaled_by_length() -> None:
    for length in (64, 512, 2048):
        noise = feature_noise([7, 0], [length + 3, length], 64, 0.2, CPU)
        bound = 0.1 * 512 / length
        assert noise.shape == (2, length + 3, 64)
        noise = noise[1, :length]
        assert 0.98 * bound < float(noise.abs().max()) <= bound
        assert abs(float(noise.mean())) < 0.02 * bound
        assert abs(float(noise.var()) / (bound**2 / 3) - 1) < 0.05


def test_noise_touches_inputs_alone_and_follows_seed_epoch_and_sequence() -> None:
    source = make_source()

    def inputs(index: int, seed: int = 0, epoch: int = 0) -> torch.Tensor:
        batch = collate(source, [index, 19], noise=0.2, seed=seed, epoch=epoch, device=CPU)
        features = source.samples[index].features
        assert torch.equal(batch.targets[0, : len(features) - 2], features[1:-1])
        return batch.inputs[0, : len(features) - 2] - features[:-2]

    first = inputs(3)
    assert 0 < float(first.abs().max()) <= 0.1 * 512 / 9 + 1e-5
    assert torch.equal(inputs(3), first)
    others = [inputs(3, seed=1), inputs(3, epoch=1), inputs(23)[:7]]
    assert not any(torch.equal(first, other) for other in others)


def test_bad_rows() -> None:
    source = make_source()
    source.samples[2].features[3, 0] = float("nan")
    batch = collate(source, [1, 2, 3], noise=0.2, seed=0, epoch=0, device=CPU)
    assert batch.bad_rows() == [2]
