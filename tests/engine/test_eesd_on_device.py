"""EESD on a simulated GPU: nobody waits, drafts are taken up behind layer N, texts stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specrt.config import ModelConfig
from specrt.draft.base import DraftParams
from specrt.draft.length.control import CONTROLLERS
from specrt.models.layer_run import LayerRun, LowerLayers
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from tests.engine.exits import make_device_drafter, make_exit_pair
from tests.engine.support import make_engine, texts
from tests.ops.conftest import load_simt
from tests.simulated_gpu import SimulatedGpu, simulated_gpu

VOCAB = 97
PROMPTS = [[5, 9, 5, 9, 5] * 3, [3], [(11 * i * i + 3 * i) % VOCAB for i in range(70)], [7, 8] * 4]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
MIXED = [
    GREEDY,
    replace(GREEDY, temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.2),
    replace(GREEDY, temperature=1.0, top_k=7, min_p=0.01, seed=6),
    replace(GREEDY, temperature=1.3, seed=7),
]
SHAPES = [None, DraftParams(top_k=2), DraftParams(depth=2, top_k=3), DraftParams(depth=3)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_exit_pair(
        tmp_path_factory.mktemp("eesd"),
        head_dim=64,
        max_position_embeddings=256,
        dtype=torch.bfloat16,
    )


@pytest.fixture(scope="module")
def loaded(pair: tuple[Path, Path]) -> tuple[ModelConfig, Weights]:
    config = ModelConfig.from_directory(pair[0])
    return config, load_weights(pair[0], config, torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    simt = load_simt()
    simt.set_schedule(1)
    with simulated_gpu(simt, monkeypatch) as made:
        yield made


@pytest.fixture
def model(loaded: tuple[ModelConfig, Weights], gpu: SimulatedGpu) -> LlamaModel:
    config, weights = loaded
    return LlamaModel(config, place_weights(weights, gpu), gpu)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each round's trees were taken up behind the layers that were run."""
    seen: list[bool] = []
    take = LowerLayers.take

    def listen(self: LowerLayers, *arguments: object) -> LayerRun | None:
        run = take(self, *arguments)  # type: ignore[arg-type]
        seen.append(run is not None)
        return run

    monkeypatch.setattr(LowerLayers, "take", listen)
    return seen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_drafting_changes_nothing(
    model: LlamaModel, pair: tuple[Path, Path], taken: list[bool], shape: DraftParams | None
) -> None:
    params = [replace(p, max_new_tokens=6 + 3 * i) for i, p in enumerate(MIXED)]
    expected = texts(make_engine(model).generate(PROMPTS, params))
    taken.clear()
    drafter = make_device_drafter(model, pair[1])
    results = make_engine(model, drafter, max_batch=3).generate(PROMPTS, params, shape)
    assert texts(results) == expected
    assert not [one.error for one in results if one.error]
    assert sum(one.stats.num_accepted_tokens for one in results) > 5
    print(taken, [r.stats.accept_lengths for r in results], [r.stats.num_draft_tokens for r in results])
