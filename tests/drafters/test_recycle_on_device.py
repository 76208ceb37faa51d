"""Token Recycling in rounds that are launches alone, on a GPU, simulated or real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from specrt.cache import CacheBatch, KVCache
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import BatchTables, Budget, DraftParams, LaunchedDrafter, StageTimes
from specrt.draft.length.costs import RoundCost
from specrt.draft.recycle.on_device import DeviceRecycleDrafter
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams, SamplingRows
from specrt.types import RoundReport, SequenceState
from tests.checkpoints import make_checkpoint
from tests.drafters.launched_rig import Rounds

VOCAB = 41  # so few that tokens come again
PROMPTS = [[(7 * i * i + i) % VOCAB for i in range(n)] for n in (9, 1)]
PARAMS = [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=5)]
SHAPE = DraftParams(depth=4, top_k=3, total_tokens=12)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 1, "head_dim": 64}
    make_checkpoint("llama", path, **sizes, max_position_embeddings=320, dtype=torch.bfloat16)
    return path


@pytest.fixture
def model(target: Path, gpu: Device) -> LlamaModel:
    config = ModelConfig.from_directory(target)
    weights = load_weights(target, config, torch.bfloat16)
    return LlamaModel(config, place_weights(weights, gpu), gpu)


def rounds(model: LlamaModel, draft: DraftParams = SHAPE) -> Rounds:
    drafter = DeviceRecycleDrafter(VOCAB, model.device)
    return Rounds(model, drafter, PROMPTS, PARAMS, draft)


def tables_of(gpu: Device, target: Path) -> BatchTables:
    """One sequence's; only its root is looked at."""
    ints, table = gpu.zeros(1, dtype=torch.int32), gpu.zeros(1, 1, dtype=torch.int32)
    sampling = SamplingRows(1, VOCAB, gpu).table(1)
    config = ModelConfig.from_directory(target)
    batch = CacheBatch(KVCache(config, torch.float32, device=gpu))
    return BatchTables(table, ints, ints, ints, ints, ints, table, batch, sampling)


def same(one: torch.Tensor, other: torch.Tensor, device: Device) -> bool:
    return torch.equal(*(device.read(tensor.clone()) for tensor in (one, other)))


def test_launched_rounds_draft_and_learn_what_others_do(model: LlamaModel) -> None:
    launched, at_once, plain = rounds(model), rounds(model), rounds(model)
    assert isinstance(launched.drafter, LaunchedDrafter)
    launched.launched(5)
    at_once.told_at_once(5)
    for one, other in zip(launched.trees, at_once.trees, strict=True):
        for name in ("draft_tokens", "parents", "num_nodes"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert any(tree.draft_tokens[:, 1:].any() for tree in launched.trees)
    texts = [state.token_ids for state in launched.states]
    assert texts == [state.token_ids for state in at_once.states]
    tables = [one.drafter._tables.slots for one in (launched, at_once)]  # type: ignore[attr-defined]
    for name in ("rows", "is_own"):
        assert same(*(getattr(one, name) for one in tables), model.device)
    said = [len(text) - len(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)]
    assert max(said) > 5  # some were right
    plain.undrafted(max(said))
    for text, state in zip(texts, plain.states, strict=True):
        assert state.token_ids[: len(text)] == text


@pytest.mark.parametrize("is_right", [False, True])
def test_sizes_follow_reports(gpu: Device, target: Path, is_right: bool) -> None:
    """Trees of which nothing is right get smaller, until there is none but now and then."""
    drafter = DeviceRecycleDrafter(VOCAB, gpu)
    state = SequenceState([1], 1, 99, 0, 0.0)
    drafter.start(state)
    sizes = []
    for _ in range(60):
        plan = drafter.plan([state], Budget(64, RoundCost(slope=0.02)))
        tree = drafter.launch_propose(plan, tables_of(gpu, target))
        sizes.append(tree.draft_tokens.shape[1])
        path = np.full((1, sizes[-1]), -1, dtype=np.int32)
        path[0, 0] = 0
        if is_right and sizes[-1] > 1:
            path[0, 1] = 1
        counts = (np.array([n], dtype=np.int32) for n in (sizes[-1], is_right, 1 + is_right))
        drafter.told([state], plan, RoundReport(*counts, path), StageTimes(0.0, 1.0, 0.0))
    assert max(sizes) > 1 and (sizes.count(1) >= 10) == (not is_right)


def test_a_sequence_that_begins_alone_ends_a_pause(gpu: Device) -> None:
    drafter = DeviceRecycleDrafter(VOCAB, gpu)
    first, beside, alone = (SequenceState([1], 1, 99, 0, 0.0) for _ in range(3))
    drafter.start(first)
    dear = RoundCost(slope=1.0)
    while (rests := drafter._policy.gain()) != 1.0:
        drafter.plan([first], Budget(64, dear))
        drafter._policy.observe_draft(9.0, 0.0, 0)
        dear.observe(1, 1.0)
    drafter.start(beside)
    assert drafter._policy.gain() == rests, "it joins others"
    for state in (first, beside):
        drafter.finish(state)
    drafter.start(alone)
    assert drafter._policy.gain() > 1.0, "it is tried"


def test_plans_are_equal_where_launches_are(gpu: Device) -> None:
    drafter = DeviceRecycleDrafter(VOCAB, gpu)
    states = [SequenceState([n], 1, 99, 0, 0.0) for n in range(3)]
    for state in states:
        drafter.start(state)
    budget = Budget(16, RoundCost(), SHAPE)

    def order() -> list[int]:
        return gpu.read(drafter._tables.slots.order.clone()).tolist()

    plan = drafter.plan(states[:2], budget)
    assert drafter.plan(states[:2], budget) == plan and order()[:2] == [0, 1]
    assert drafter.plan(states[:0:-1], budget) == plan and order()[:2] == [2, 1]
    assert drafter.plan(states, budget) != plan
    assert drafter.plan(states[:2], Budget(16, RoundCost(), DraftParams(depth=1))) != plan
    drafter.finish(states[1])
    late = [SequenceState([n], 1, 99, 0, 0.0) for n in range(2)]
    drafter.start(late[0])  # where the one that left has been
    assert drafter.plan([states[0], late[0]], budget) == plan and order()[:2] == [0, 1]
    drafter.start(late[1])
    for _ in range(2):
        drafter.start(SequenceState([0], 1, 99, 0, 0.0))
    assert drafter.plan([states[0], late[1]], budget) != plan  # tables have moved
    assert order()[:2] == [0, 3]


def test_one_that_leaves_hands_on_what_it_has_learned(gpu: Device) -> None:
    drafter = DeviceRecycleDrafter(VOCAB, gpu)
    first, second = (SequenceState([n], 1, 99, 0, 0.0) for n in range(2))
    drafter.start(first)
    drafter.start(second)
    slots = drafter._tables.slots
    slots.rows[0, 3] += 7
    slots.is_own[0, 3] += 1
    slots.rows[0, 4] += 9  # not told to be learned
    slots.rows[1, 3] += 8
    slots.is_own[1, 5] += 1
    drafter.finish(first)
    drafter.finish(second)
    drafter.finish(second)
    third = SequenceState([2], 1, 99, 0, 0.0)
    drafter.start(third)
    (place,) = drafter._tables.numbers([third])
    assert gpu.read(slots.rows[place, 2:6, 0].clone()).tolist() == [0, 7, 0, 0]
    assert not gpu.read(slots.is_own[place].clone()).any()
