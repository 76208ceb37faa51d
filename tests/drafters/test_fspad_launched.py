"""One-layer drafters' rounds as launches alone, on a GPU, simulated or real."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Budget, DraftParams, LaunchedDrafter
from specrt.draft.fspad.checkpoint import read_checkpoint, reduce_vocabulary, write_checkpoint
from specrt.draft.fspad.on_device import DeviceFspadDrafter
from specrt.draft.fspad.pairs import MAX_PAIRS
from specrt.draft.length.costs import RoundCost
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from specrt.sampling.rows import sampling_row
from tests.checkpoints import make_checkpoint, make_draft_checkpoint
from tests.drafters.fspad_rig import make_drafter
from tests.drafters.launched_rig import Rounds

VOCAB = 41  # so few that random drafters are right now and then
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "dtype": torch.bfloat16,
}
PROMPTS = [[(7 * i * i + i) % VOCAB for i in range(n)] for n in (9, 70, 2, 20)]
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.9, seed=5),
    SamplingParams(temperature=1.3, top_k=7, seed=6),
    SamplingParams(),
]
SHAPE = DraftParams(depth=3, top_k=4, total_tokens=14)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    target = folder / "target"
    make_checkpoint("llama", target, **SIZES)
    for arch in ("fspad", "eagle2"):
        make_draft_checkpoint(target, folder / arch, arch)
    config, tensors = read_checkpoint(folder / "fspad", ModelConfig.from_directory(target))
    few = reduce_vocabulary(config, tensors, torch.arange(VOCAB), 24)
    write_checkpoint(folder / "reduced", *few)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def model(checkpoints: Mapping[str, Path], gpu: Device) -> LlamaModel:
    path = checkpoints["target"]
    config = ModelConfig.from_directory(path)
    weights = place_weights(load_weights(path, config, torch.bfloat16), gpu)
    return LlamaModel(config, weights, gpu)


def rounds(
    model: LlamaModel,
    path: Path,
    batch: int = 2,
    draft: DraftParams | None = SHAPE,
    **options: Any,
) -> Rounds:
    drafter = make_drafter(model, path, **options)
    assert isinstance(drafter, DeviceFspadDrafter) and isinstance(drafter, LaunchedDrafter)
    made = Rounds(model, drafter, PROMPTS[:batch], PARAMS[:batch], draft)
    for state, params in zip(made.states, PARAMS, strict=False):
        state.sampling_row = sampling_row(params, state.prompt_len)
    return made


def same_trees(one: Rounds, other: Rounds) -> None:
    assert len(one.trees) == len(other.trees)
    for ours, theirs in zip(one.trees, other.trees, strict=True):
        for name in ("draft_tokens", "parents", "num_nodes"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert [s.token_ids for s in one.states] == [s.token_ids for s in other.states]


@pytest.mark.parametrize(
    ("name", "batch", "options"),
    [
        ("fspad", 3, {"fold": False}),
        ("fspad", 1, {"fold": True}),
        ("eagle2", 4, {"fold": True}),
        ("reduced", 2, {"fold": False}),
    ],
)
def test_trees_are_those_of_rounds_that_are_told_at_once(
    checkpoints: Mapping[str, Path],
    model: LlamaModel,
    name: str,
    batch: int,
    options: dict[str, Any],
) -> None:
    """Whoever launched the round before: pairs go from rows to sequences and back."""
    launched, at_once = (rounds(model, checkpoints[name], batch, **options) for _ in range(2))
    launched.launched(3)
    launched.told_at_once(2)
    launched.launched(2)
    at_once.told_at_once(7)
    same_trees(launched, at_once)
    accepted = sum(len(s.token_ids) - s.prompt_len for s in launched.states) - 7 * batch
    assert accepted > 0
