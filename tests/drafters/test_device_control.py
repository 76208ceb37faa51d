"""Draft control that lives on a device says what the host's says, and is never read."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specrt import _C
from specrt.device import Device
from specrt.draft.length import device_control
from specrt.draft.length.control import CONTROLLERS, ControlOptions, DraftControl, Posterior
from specrt.draft.length.costs import DraftCosts
from specrt.draft.length.device_control import DeviceControl
from specrt.types import SequenceState
from tests.interrupts import interrupted
from tests.ops.conftest import Backend, backend, load_simt, pytest_generate_tests
from tests.simulated_gpu import simulated_gpu

__all__ = ["backend", "pytest_generate_tests"]

T = TypeVar("T")
COSTS = DraftCosts(fixed=0.02, step=0.08, lower=0.05, verify=0.95, row=0.03)
STEPS = 5


def device_of(backend: Backend) -> Device:
    return Device(backend.device, is_gpu=backend.runs_cuda_source)


def by_the_extension(work: Callable[[], T]) -> T:
    """What ``work`` on the CPU's tensors gives, whatever stands in for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["specrt.ops.draft_control"], "_C", _C)
        return work()


def sequence(seed: int = 0, left: int = 10**6) -> SequenceState:
    return SequenceState([0] * 9, 9, 9 + left, seed, float(seed % 2))


@dataclass
class Script:
    """Rounds of batches that sequences join and leave: a function of its seed."""

    rng: random.Random
    states: list[SequenceState] = field(default_factory=list)
    num_started: int = 0

    def change(self, control: DraftControl | DeviceControl) -> None:
        """Somebody leaves, somebody joins; up to five are there."""
        if len(self.states) > 1 and self.rng.random() < 0.4:
            control.finish(self.states.pop(self.rng.randrange(len(self.states))))
        while not self.states or (len(self.states) < 5 and self.rng.random() < 0.5):
            left = self.rng.choice([1, 3, 10**6])
            self.states.append(sequence(2**64 - 2 + self.num_started, left))
            self.num_started += 1
            control.start(self.states[-1])

    def batch(self) -> list[SequenceState]:
        return self.rng.sample(self.states, self.rng.randint(1, len(self.states)))

    def scores(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Log-probabilities, evidence, accepted tokens if all were verified."""
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        chance = torch.rand(STEPS, batch, generator=generator).sqrt()
        evidence = torch.randn(STEPS, batch, 2, generator=generator) + 0.5
        accepted = [self.rng.choice([-1, 0, 1, 2, 9]) for _ in range(batch)]
        return chance.log(), evidence, accepted


def play(
    control: DraftControl | DeviceControl, device: Device, num_rounds: int
) -> list[tuple[list[int], list[int], list[str]]]:
    """Lengths and drafted tokens of each round, and what is believed after it."""
    script, said = Script(random.Random(5)), []
    slope = device.there(torch.tensor([0.9, 1.1]))
    for number in range(num_rounds):
        script.change(control)
        states = script.batch()
        scores, evidence, accepted = script.scores(len(states))
        scores, evidence = device.there(scores), device.there(evidence)
        round_: Any = control.new_round(len(states), slope)
        num_reads = device.num_reads
        round_.stage(control, states, COSTS, [number] * len(states))
        round_.decide(0)
        for step in range(1, STEPS + 1):
            round_.decide(step, scores[step - 1], evidence[step - 1])
        assert device.num_reads == num_reads
        lengths, drafted = (said_of(values, device) for values in (round_.length, round_.drafted))
        accepted = [min(count, most) for count, most in zip(accepted, lengths, strict=True)]
        told: Any = accepted
        if isinstance(control, DeviceControl):
            told = device.there(torch.tensor(accepted, dtype=torch.int32))
        round_.update(control, states, told, 1 + number % 3)
        # As text: NaN equals itself.
        said.append((lengths, drafted, [str(control.posterior(s)) for s in script.states]))
    return said


def said_of(values: Any, device: Device) -> list[int]:
    """What stands in a host's array or a device's tensor."""
    found = device.read(values) if isinstance(values, torch.Tensor) else values
    return [int(value) for value in found.tolist()]


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("kind", CONTROLLERS)
def test_it_says_what_the_hosts_says(
    backend: Backend, kind: str, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a table that has to grow."""
    monkeypatch.setattr(device_control, "_FIRST_ROWS", 2)
    options = ControlOptions(kind, max_draft=STEPS, is_shared=is_shared)
    expected = by_the_extension(lambda: play(DraftControl(options), Device(), 30))
    device = device_of(backend)
    assert play(DeviceControl(options, device), device, 30) == expected
    assert len({tuple(lengths) for lengths, *_ in expected}) > 5
    assert device.version == (0 if is_shared else 2)  # of captured steps, over a table that moved


@pytest.mark.parametrize("kind", ["adaptive-threshold", "cost-aware"])
def test_memories_are_not_mixed_and_nothing_waits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_control, "_FIRST_ROWS", 2)
    options = ControlOptions(kind, max_draft=STEPS)
    expected = play(DraftControl(options), Device(), 12)
    with simulated_gpu(load_simt(), monkeypatch) as gpu:
        assert play(DeviceControl(options, gpu), gpu, 12) == expected


def test_rounds_that_are_launched_ahead_learn_what_others_do(backend: Backend) -> None:
    """One round's buffers serve all; lengths are the device's, forgetting is said beforehand."""
    device, believed = device_of(backend), []
    ends = [device.there(torch.tensor([9, 9 + 2 * number], dtype=torch.int32)) for number in (0, 1)]
    for is_ahead in (False, True):
        control = DeviceControl(ControlOptions("beta-ts", max_draft=STEPS), device)
        states = [sequence(seed) for seed in range(2)]
        for state in states:
            control.start(state)
        round_ = control.new_round(2)
        for number, position in enumerate(ends):
            round_.stage(control, states, COSTS, None if is_ahead else position.tolist())
            round_.expect(1 + number)
            score = device.there(torch.tensor([-0.1, -0.9]))
            for step in range(STEPS + 1):
                said = score if step else None
                round_.decide(step, said, position=position if is_ahead else None)
            if is_ahead:
                round_.launch_update(round_.length)
            else:
                round_.update(control, states, round_.length, 1 + number)
        rows = device.read(control.beliefs).tolist()
        believed.append((rows, device.read(round_.drafted).tolist()))
    assert believed[0] == believed[1]


def test_caps_bound_what_is_drafted(backend: Backend) -> None:
    control = DeviceControl(ControlOptions("fixed", max_draft=4, draft_len=4), device_of(backend))
    states = [sequence(seed) for seed in range(4)]
    for state in states:
        control.start(state)
    states[3].max_len = len(states[3].token_ids) + 2
    round_ = control.new_round(4)
    round_.stage(control, states, COSTS, caps=[0, 2, 9, 4])
    for step in range(5):
        score = None if step == 0 else torch.zeros(4, device=backend.device)
        round_.decide(step, score)
    assert round_.length.tolist() == [0, 2, 4, 1]


def test_a_row_is_new_for_who_takes_it(backend: Backend) -> None:
    control = DeviceControl(ControlOptions("beta-ts"), device_of(backend))
    first, second = sequence(), sequence(1)
    control.start(first)
    prior, row = control.posterior(first), control.slots_of([first])
    learned(control, first, backend.device)
    assert control.posterior(first) != prior
    control.finish(first)
    control.finish(first)  # an engine may do so after an error
    with pytest.raises(KeyError):
        control.posterior(first)
    control.start(second)
    assert control.slots_of([second]) == row and control.posterior(second) == prior
    learned(control, second, backend.device)
    control.start(second)  # again, from its prompt
    assert control.slots_of([second]) == row and control.posterior(second) == prior


def learned(control: DeviceControl, state: SequenceState, device: torch.device) -> Posterior:
    """After a round of one accepted token."""
    round_ = control.new_round(1)
    round_.stage(control, [state], COSTS)
    round_.decide(0)
    round_.decide(1, torch.zeros(1, device=device))
    round_.update(control, [state], torch.ones(1, dtype=torch.int32, device=device))
    return control.posterior(state)


def test_who_has_left_is_not_learned_of(backend: Backend) -> None:
    """Another one may have its row by then."""
    control = DeviceControl(ControlOptions("beta-ts"), device_of(backend))
    state = sequence()
    control.start(state)
    round_ = control.new_round(1)
    round_.stage(control, [state], COSTS)
    round_.decide(0)
    control.finish(state)
    control.start(sequence(1))
    with pytest.raises(KeyError):
        round_.update(control, [state], torch.ones(1, dtype=torch.int32, device=backend.device))


class Operators(TorchDispatchMode):
    """The names of those that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_round_is_one_copy_and_its_launches(backend: Backend) -> None:
    control = DeviceControl(ControlOptions("cost-aware", max_draft=3), device_of(backend))
    states = [sequence(seed) for seed in range(3)]
    for state in states:
        control.start(state)
    round_ = control.new_round(3)
    score = torch.zeros(3, device=backend.device)
    accept_length = torch.ones(3, dtype=torch.int32, device=backend.device)
    before = load_simt().num_launches() if backend.name == "simt" else 0
    with Operators() as operators:
        round_.stage(control, states, COSTS)
        for step in range(4):
            round_.decide(step, score if step else None)
        round_.update(control, states, accept_length)
    # Pinning asks the driver, and copies within the host's memory.
    pins = {"aten.is_pinned.default", "aten.pin_memory.default", "aten._pin_memory.default"}
    copies = [name for name in operators.names if name not in pins]
    assert copies == ["aten.copy_.default"]
    if backend.name == "simt":
        assert load_simt().num_launches() - before == 5


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(backend: Backend) -> None:
    options = ControlOptions("adaptive-threshold", max_draft=3)
    control = DeviceControl(options, device_of(backend))
    score = torch.zeros(2, device=backend.device)
    accept_length = torch.ones(2, dtype=torch.int32, device=backend.device)
    round_ = control.new_round(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        states = [sequence(seed) for seed in range(2)]
        for state in states:
            control.start(state)
        round_.stage(control, states, COSTS)
        for step in range(4):
            round_.decide(step, score if step else None)
        round_.update(control, states, accept_length, num_rounds=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert round_.length.tolist() == [3, 3]


def test_no_row_is_lost_by_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a start for which the table has to grow, or of the end that follows."""
    monkeypatch.setattr(device_control, "_FIRST_ROWS", 1)
    for end in (False, True):
        number, was_interrupted = 1, True
        while was_interrupted:
            control = DeviceControl(ControlOptions("beta-ts"), Device())
            one, other = sequence(0), sequence(1)
            control.start(one)
            call = control.finish if end else control.start
            if end:
                control.start(other)
            was_interrupted = interrupted(lambda: call(other), number)  # noqa: B023
            control.finish(other)
            control.finish(one)
            assert sorted(control._free) == list(range(len(control.beliefs))), number
            number += 1
        assert number > 2
