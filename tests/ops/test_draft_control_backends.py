"""Draft control on every backend gives the CPU's bits: decisions, confidences, posteriors."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from specrt import _C
from specrt.ops.draft_control import Beliefs, ControlKind, prior_beliefs
from tests.ops.conftest import Backend, OnAnotherGpu
from tests.ops.control_rounds import SETTINGS, Batch, World, equal_bits, i32

Tensor = torch.Tensor
KINDS = list(ControlKind)
CPU = torch.device("cpu")
T = TypeVar("T")
SIZE, CAP, ROUNDS = 37, 6, 6  # two blocks of threads


def by_the_extension(work: Callable[[], T]) -> T:
    """What ``work`` on the CPU's tensors gives, whatever stands in for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["specrt.ops.draft_control"], "_C", _C)
        return work()


def mixed_batch() -> Batch:
    """Some sequences share a row, some have none, some may draft little or nothing."""
    batch = Batch.make(SIZE, CAP)
    batch.slots[[3, 9, 20, 36]] = i32([7, 7, 0, 7])
    batch.slots[[4, 11]] = i32([-1, SIZE])
    batch.limit.copy_(i32([CAP, CAP, 1, 0, 3, CAP, CAP, -2] * 5)[:SIZE])
    batch.seed[5], batch.seed[6] = -(2**63), 2**63 - 1
    return batch


def mixed_world(number: int) -> World:
    """Scores that are no log-probabilities among them."""
    world = World.random(SIZE, CAP, number)
    world.score[1, [0, 12]] = torch.tensor([math.nan, math.inf])
    world.score[0, [13, 14]] = torch.tensor([-math.inf, -0.0])
    world.evidence[2, 15] = math.nan
    return world


def play(device: torch.device, kind: int, uses_head: bool) -> list[list[Tensor]]:
    """Outputs of each round."""
    batch, rounds = mixed_batch().to(device), []
    for number in range(ROUNDS):
        mixed_world(number).to(device).play(batch, kind, uses_head)
        rounds.append([t.cpu().clone() for t in batch.outputs()])
        assert batch.num_nodes.equal(1 + batch.length)
        batch.position.add_(batch.accept_length + 1)
    return rounds


@pytest.mark.parametrize("uses_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_the_cpus(backend: Backend, kind: ControlKind, uses_head: bool) -> None:
    expected = by_the_extension(lambda: play(CPU, kind, uses_head))
    for got, want in zip(play(backend.device, kind, uses_head), expected, strict=True):
        assert equal_bits(got, want)
    lengths = torch.stack([outputs[2] for outputs in expected])
    assert len(lengths.unique()) > (2 if kind == ControlKind.FIXED else 4)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_a_shared_posterior_learns_in_the_order_of_the_batch(
    backend: Backend, kind: ControlKind
) -> None:
    """Of sequences that leave other bits in another order."""
    settings = SETTINGS._replace(discount=0.7, threshold=0.95)

    def learned(device: torch.device, order: list[int]) -> Tensor:
        batch = Batch.make(40, CAP, settings)
        batch.slots.fill_(3)
        batch.drafted.copy_(i32([4, 2, 5, 6, 3] * 8))
        batch.length.copy_(batch.drafted - i32([0, 0, 1, 0, 1] * 8))
        batch.accept_length.copy_(i32([1, 2, 0, 6, -1] * 8))
        batch.confidence.copy_(torch.rand(40, CAP, generator=torch.Generator().manual_seed(1)))
        batch = replace(batch.rows(order), slots=batch.slots).to(device)
        batch.update(kind)
        return batch.posterior.cpu()

    forth = list(range(40))
    got = learned(backend.device, forth)
    assert equal_bits([got], [by_the_extension(lambda: learned(CPU, forth))])
    assert not got[3].equal(learned(backend.device, forth[::-1])[3])
    assert equal_bits([got[2]], [prior_beliefs(settings.tensor())])


def test_a_sequence_that_stopped_stays_as_it_is(backend: Backend) -> None:
    """So that all steps may be launched before anything is read."""
    batch = Batch.make(4, CAP, SETTINGS._replace(threshold=0.5)).to(backend.device)
    scores = torch.tensor([[0.9, 0.4, 0.9, 0.9], [0.9, 0.9, 0.2, 0.9], [0.1, 0.9, 0.9, 0.9]])
    batch.posterior[:, Beliefs._fields.index("threshold")] = 0.5
    batch.limit[3] = 2
    batch.decide(ControlKind.THRESHOLD, 0)
    stopped: dict[int, list[Tensor]] = {}
    for step, row in enumerate(scores.log().to(backend.device), 1):
        batch.decide(ControlKind.THRESHOLD, step, row)
        for b, is_open in enumerate(batch.is_open.tolist()):
            own = [t[b : b + 1].clone() for t in batch.outputs()]
            if not is_open:
                assert equal_bits(stopped.setdefault(b, own), own)
    assert batch.length.tolist() == [3, 1, 2, 2]
    assert batch.is_open.tolist() == [0, 0, 0, 0]


def test_columns_and_single_sequences(backend: Backend) -> None:
    """A batch is its sequences; a score may be a column."""
    scores = torch.full((SIZE, 3), math.nan)
    scores[:, 1] = World.random(SIZE, 1, 0).score[0]
    scores = scores.to(backend.device)
    batch = mixed_batch().to(backend.device)
    batch.decide(ControlKind.COST_AWARE, 0)
    batch.decide(ControlKind.COST_AWARE, 1, scores[:, 1])
    for b in (0, 5, 31, 32, 36):
        alone = mixed_batch().rows([b]).to(backend.device)
        alone.decide(ControlKind.COST_AWARE, 0)
        alone.decide(ControlKind.COST_AWARE, 1, scores[b : b + 1, 1])
        assert equal_bits(alone.outputs()[:4], [t[[b]] for t in batch.outputs()[:4]])


@pytest.mark.parametrize("name", ["settings", "costs", "slots", "limit", "length", "confidence"])
def test_tensors_on_two_devices_are_named(name: str) -> None:
    batch = Batch.make(2)
    wrong = replace(batch, **{name: OnAnotherGpu(getattr(batch, name))})
    message = f"^{name}: expected a tensor on cpu as posterior is, got one on cuda:1"
    for launch in (lambda: wrong.decide(0, 0), lambda: wrong.update(0)):
        with pytest.raises(ValueError, match=message):
            launch()


def test_a_prior_is_made_where_it_is_wanted(backend: Backend) -> None:
    settings = SETTINGS.tensor()
    row = prior_beliefs(settings, backend.device)
    assert row.device.type == backend.device.type
    assert equal_bits([row.cpu()], [by_the_extension(lambda: prior_beliefs(settings))])
    assert prior_beliefs(settings).device == CPU
