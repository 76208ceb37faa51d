"""A small model's rounds as launches alone, on a GPU, simulated or real."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Budget, DraftParams, LaunchedDrafter
from specrt.draft.length.costs import RoundCost
from specrt.draft.small_model.on_device import DeviceSmallModelDrafter
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from specrt.types import SequenceState
from tests.checkpoints import make_checkpoint
from tests.drafters.launched_rig import Rounds

VOCAB, SMALLER = 41, 37
PROMPTS = [[(7 * i * i + i) % VOCAB for i in range(n)] for n in (9, 70)]
GREEDY = [SamplingParams()] * 2
MIXED = [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=5)]
DEPTH = 3


def load(path: Path, gpu: Device) -> LlamaModel:
    config = ModelConfig.from_directory(path)
    weights = load_weights(path, config, torch.bfloat16)
    return LlamaModel(config, place_weights(weights, gpu), gpu)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the size of the vocabulary."""
    sizes = {"num_hidden_layers": 1, "head_dim": 64, "max_position_embeddings": 320}
    made = {}
    for vocab_size in (VOCAB, SMALLER):
        made[vocab_size] = tmp_path_factory.mktemp("model")
        make_checkpoint(
            "llama", made[vocab_size], **sizes, vocab_size=vocab_size, dtype=torch.bfloat16
        )
    return made


@pytest.fixture
def model(checkpoints: dict[int, Path], gpu: Device) -> LlamaModel:
    return load(checkpoints[VOCAB], gpu)


def rounds(
    model: LlamaModel,
    params: list[SamplingParams],
    width: int = 1,
    draft: DraftParams | None = None,
) -> Rounds:
    """The target drafts for itself, so that all is accepted that it drafts rightly."""
    drafter = DeviceSmallModelDrafter(model, DEPTH, width)
    assert isinstance(drafter, LaunchedDrafter)
    return Rounds(model, drafter, PROMPTS, params, draft)


def said(done: Rounds) -> list[list[int]]:
    return [s.token_ids[s.prompt_len :] for s in done.states]


def test_a_model_that_drafts_for_itself_is_always_right(model: LlamaModel) -> None:
    """Greedy, and with the target's own noise; whatever was accepted before, and whoever launched
    the round before."""
    launched, plain = rounds(model, MIXED), rounds(model, MIXED)
    launched.launched(3)
    assert [len(text) for text in said(launched)] == [3 * (DEPTH + 1)] * 2
    launched.told_at_once(1)
    launched.launched(2)
    assert len(said(launched)[0]) == 6 * (DEPTH + 1)
    plain.undrafted(6)
    for text, expected in zip(said(launched), said(plain), strict=True):
        assert text[:6] == expected


def test_chains_are_those_of_rounds_that_are_told_at_once(model: LlamaModel) -> None:
    launched, at_once = rounds(model, GREEDY), rounds(model, GREEDY)
    launched.launched(3)
    at_once.told_at_once(3)
    for one, other in zip(launched.trees, at_once.trees, strict=True):
        for name in ("draft_tokens", "parents", "num_nodes"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_wider_trees_of_another_model(
    model: LlamaModel, checkpoints: dict[int, Path], gpu: Device
) -> None:
    """Of a smaller vocabulary: its tokens alone are drafted, and the text is plain decoding's."""
    drafter = DeviceSmallModelDrafter(load(checkpoints[SMALLER], gpu), vocab_size=VOCAB)
    shape = DraftParams(depth=2, top_k=3)
    wide, plain = Rounds(model, drafter, PROMPTS, MIXED, shape), rounds(model, MIXED)
    wide.launched(4)
    for tree in wide.trees:
        assert tree.num_nodes.tolist() == [7, 7]
        assert (tree.draft_tokens[:, 1:] < SMALLER).all()
        assert len({*tree.draft_tokens[0, 1:4].tolist()}) > 1
    plain.undrafted(4)
    for text, expected in zip(said(wide), said(plain), strict=True):
        assert text[:4] == expected


def test_when_the_host_is_needed(model: LlamaModel) -> None:
    drafter = DeviceSmallModelDrafter(model, DEPTH)

    def plans(length: int, draft: DraftParams | None = None, max_nodes: int = 16) -> bool:
        state = SequenceState([1] * length, length, 320, 0, 0.0)
        drafter.start(state)
        drafter._cached[state].length = length - 1  # as if its prompt had been run
        plan = drafter.plan([state], Budget(max_nodes, RoundCost(), draft))
        drafter.finish(state)
        return plan is not None

    assert plans(DEPTH + 1) and not plans(DEPTH)  # shorter than the tail
    assert plans(313) and not plans(314)  # with 4 under way and 3 to come, 320 positions are full
    assert not plans(20, DraftParams(depth=0)) and not plans(20, max_nodes=1)
    drafter = DeviceSmallModelDrafter(model, DEPTH)
    drafter.cache.fix(2)
    assert plans(121) and not plans(122)  # likewise of the 128 positions that there are pages for


def test_one_that_is_far_behind_is_caught_up_by_the_host(model: LlamaModel) -> None:
    drafter = DeviceSmallModelDrafter(model, DEPTH)
    state = SequenceState([1] * 20, 20, 99, 0, 0.0)
    drafter.start(state)
    budget = Budget(16, RoundCost())
    assert drafter.plan([state], budget) is None  # nobody has run its prompt
    drafter.propose([state], budget)
    state.token_ids.append(2)
    first = drafter.plan([state], budget)
    assert first is not None and first == drafter.plan([state], budget)
    assert first != drafter.plan([state], Budget(16, RoundCost(), DraftParams(depth=2)))
    state.token_ids += [3] * DEPTH
    assert drafter.plan([state], budget) is not None
    state.token_ids.append(4)
    assert drafter.plan([state], budget) is None
