"""Drafters behind prompts whose pieces are several chains: what they read is the prompt's rows.

Trees are held against those of an engine whose pieces are one chain each: a tap out of its place
would change no text, but what is drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Drafter, DraftParams, LaunchedDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.models.prefill import Prompts
from specrt.sampling import SamplingParams
from specrt.types import Proposal
from tests.checkpoints import make_draft_checkpoint
from tests.engine.exits import make_device_drafter, make_drafter, make_exit_pair
from tests.engine.support import make_engine, texts

VOCAB = 97
SIZES = {
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "dtype": torch.bfloat16,
}
PROMPT = [(7 * i * i + i) % VOCAB for i in range(60)]  # four chains of 16 rows
GREEDY = SamplingParams(max_new_tokens=3, ignore_eos=True)
SHAPE = DraftParams(depth=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("long")
    target, _ = make_exit_pair(made, **SIZES)
    make_draft_checkpoint(target, made / "draft")
    return made


def fspad(model: LlamaModel, folder: Path) -> Drafter:
    return load_drafter(folder / "draft", model, None, DrafterOptions())


def eesd(model: LlamaModel, folder: Path) -> Drafter:
    make = make_device_drafter if model.device.is_gpu else make_drafter
    return make(model, folder / "exit", "fixed", draft_len=2)


def small_model(model: LlamaModel, folder: Path) -> Drafter:
    return SmallModelDrafter(model, depth=2)


DRAFTERS: Mapping[str, Callable[[LlamaModel, Path], Drafter]] = {
    "fspad": fspad,
    "eesd": eesd,
    "small model": small_model,
}


def generated(
    model: LlamaModel, drafter: Drafter, most: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[int]], list[list[int]]]:
    """Texts, and the tokens of all trees, of prompts in pieces of so many rows."""
    model.prompts, trees = Prompts(model.device, most, 16), list[list[int]]()
    bare, device = drafter.propose, model.device

    def propose(*arguments: object) -> Proposal:
        proposal = bare(*arguments)  # type: ignore[arg-type]
        tokens = proposal.draft_tokens
        trees.append((device.read(tokens) if device.holds(tokens) else tokens).ravel().tolist())
        return proposal

    monkeypatch.setattr(drafter, "propose", propose)
    if isinstance(drafter, LaunchedDrafter):  # its trees are to be looked at
        monkeypatch.setattr(drafter, "plan", lambda *_: None)
    engine = make_engine(model, drafter, max_batch=1)
    return texts(engine.generate([PROMPT], GREEDY, draft=SHAPE)), trees


def check(folder: Path, name: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_directory(folder / "target")
    weights = load_weights(folder / "target", config, torch.bfloat16)
    model = LlamaModel(config, place_weights(weights, device), device)
    one_by_one, together = (
        generated(model, DRAFTERS[name](model, folder), most, monkeypatch) for most in (16, 64)
    )
    assert together == one_by_one
    assert max(map(len, together[1])) > 1  # or nothing was drafted


@pytest.mark.parametrize("name", DRAFTERS)
def test_on_the_cpu(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check(folder, name, Device(), monkeypatch)
    assert not caplog.messages


@pytest.mark.parametrize("name", DRAFTERS)
def test_on_a_gpu(
    folder: Path,
    gpu: Device,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    check(folder, name, gpu, monkeypatch)
    assert not [message for message in caplog.messages if "undrafted" in message]
