"""The draft module: reference vectors, names, causality."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from specrt.config import ModelConfig
from specrt.draft.fspad.checkpoint import ARCHS, DraftConfig, tensor_shapes
from specrt.train.fspad.module import DraftModel
from tests.train.support import HIDDEN, draft_config, random_model

GOLDEN = Path(__file__).parents[1] / "golden"


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.norm())


@pytest.mark.parametrize("arch", ["fspad", "eagle2"])
def test_golden(arch: str) -> None:
    with safe_open(GOLDEN / f"{arch}.safetensors", "pt") as file:
        data = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    layer = ModelConfig.from_dict({"model_type": "llama", "num_hidden_layers": 1, **data})
    model = DraftModel(DraftConfig(layer, *ARCHS[arch]))
    weights = {k.removeprefix("weights."): t for k, t in tensors.items() if k.startswith("weights")}
    embed = weights.pop("embed_tokens.weight")
    model.load_state_dict(weights)
    predicted, regressed = model(tensors["in.features"], embed[tensors["in.token_ids"][:, 1:]])
    assert relative(predicted, tensors["out.predict"]) < 1e-4
    assert relative(regressed, tensors.get("out.regress", tensors["out.predict"])) < 1e-4


@pytest.mark.parametrize("arch", ARCHS)
def test_state_dict_is_a_checkpoint(arch: str) -> None:
    state = DraftModel(draft_config(arch)).state_dict()
    assert {key: tuple(t.shape) for key, t in state.items()} == tensor_shapes(draft_config(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_causal_and_blind_to_padding(arch: str) -> None:
    model = random_model(arch)
    features, embeddings = torch.randn(2, 1, 9, HIDDEN)
    whole = model(features, embeddings)
    features[:, 5:], embeddings[:, 5:] = 100.0, -100.0
    for before, after in zip(whole, model(features, embeddings), strict=True):
        torch.testing.assert_close(before[:, :5], after[:, :5])
        assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("arch", ARCHS)
def test_attends_to_earlier_pairs(arch: str) -> None:
    model = random_model(arch)
    features, embeddings = torch.randn(2, 1, 9, HIDDEN)
    before = model(features, embeddings)[0][:, 8]
    features[:, 2] += 1.0
    assert not torch.allclose(before, model(features, embeddings)[0][:, 8])


def test_seed_decides_initial_weights() -> None:
    one, same, other = (DraftModel(draft_config(), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["fc.fc.weight"], other["fc.fc.weight"])


def test_rope_table_grows() -> None:
    model = DraftModel(draft_config())
    short = model.rope_rows(4).clone()
    assert len(model.rope_rows(5000)) == 5000
    assert torch.equal(model.rope_rows(4), short)
