"""The one-layer drafters beside their target on a simulated GPU: text, trees, launches, reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Budget, DraftParams
from specrt.draft.fspad.checkpoint import ARCHS, read_checkpoint, reduce_vocabulary, write_checkpoint
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.length.control import ControlOptions
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from specrt.types import Proposal, SequenceState
from tests.checkpoints import make_checkpoint, make_draft_checkpoint
from tests.drafters.fspad_rig import make_drafter
from tests.engine.support import make_engine, texts
from tests.ops.conftest import load_simt
from tests.simulated_gpu import SimulatedGpu, simulated_gpu

VOCAB = 41  # so few that random drafters are right now and then
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "dtype": torch.bfloat16,
}
PROMPTS = [[(7 * i * i + i) % VOCAB for i in range(n)] for n in (70, 1, 9)]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.95, seed=5, ignore_eos=True)
SHAPE = DraftParams(depth=3, top_k=4, total_tokens=20)
OTHER_SETTINGS = SamplingParams(
    max_new_tokens=5, temperature=0.7, top_k=9, repetition_penalty=1.2, seed=3, ignore_eos=True
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, **SIZES)
    return path


@pytest.fixture(scope="module")
def drafters(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("drafters")
    for arch in ARCHS:
        make_draft_checkpoint(target, folder / arch, arch)
    config, tensors = read_checkpoint(folder / "fspad", ModelConfig.from_directory(target))
    few = reduce_vocabulary(config, tensors, torch.arange(VOCAB), 24)
    write_checkpoint(folder / "reduced", *few)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    simt = load_simt()
    simt.set_schedule(1)
    with simulated_gpu(simt, monkeypatch) as gpu:
        yield gpu


def make_model(path: Path, device: Device) -> LlamaModel:
    config = ModelConfig.from_directory(path)
    weights = place_weights(load_weights(path, config, torch.bfloat16), device)
    return LlamaModel(config, weights, device)


def answers(model: LlamaModel, params: SamplingParams) -> list[list[int]]:
    return texts(make_engine(model, max_batch=1).generate(PROMPTS, params))
