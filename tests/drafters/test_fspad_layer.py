"""The served layer against the torch module, where reference vectors do not reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specrt.config import Form, ModelConfig
from specrt.device import Device
from specrt.draft.fspad.checkpoint import ARCHS, DraftConfig
from specrt.draft.fspad.layer import DraftLayer
from specrt.draft.fspad.weights import fold, pack_weights
from specrt.models.rope import RotaryTable
from specrt.train.fspad.module import DraftModel
from tests.checkpoints import make_checkpoint, random_draft_tensors
from tests.golden.check import forward

VOCAB = 97
NUM_PAIRS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path)
    return ModelConfig.from_directory(path)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize(("has_bias", "head_dim"), [(True, 16), (False, 20), (True, 10)])
@pytest.mark.parametrize("arch", ARCHS)
def test_biases_and_padded_heads(
    model: ModelConfig, arch: str, has_bias: bool, head_dim: int, is_folded: bool
) -> None:
    config = DraftConfig.for_target(model, arch, name="x")
    layer = replace(config.layer, has_attention_bias=has_bias, head_dim=head_dim)
    config = replace(config, layer=layer)
    tensors = random_draft_tensors(config, torch.float32)
    tables = torch.randn(2, VOCAB, layer.hidden_size, generator=torch.Generator().manual_seed(1))
    weights = pack_weights(config, tensors, *tables, torch.float32)
    tokens, features = torch.arange(NUM_PAIRS).int(), tables[1, :NUM_PAIRS]
    served = forward(DraftLayer(config, fold(weights) if is_folded else weights), tokens, features)
    module = DraftModel(config)
    module.load_state_dict(tensors)
    with torch.no_grad():
        expected = module(features[None], tables[0][tokens.long()][None])
    for got, wanted in zip(served, expected, strict=True):
        assert error(got, wanted[0]) < 1e-5
    if has_bias:  # or leaving it out would not show
        weights.qkv_bias.zero_()  # type: ignore[union-attr]
        assert error(forward(DraftLayer(config, weights), tokens, features)[0], served[0]) > 1e-3


def test_logits_are_scaled_and_capped_as_the_targets_are(model: ModelConfig) -> None:
    config = DraftConfig.for_target(model, "fspad", name="x")
    tensors = random_draft_tensors(config, torch.float32)
    tables = torch.randn(2, VOCAB, model.hidden_size, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-1, 1, VOCAB)
    plain, biased = (
        pack_weights(config, tensors, *tables, torch.float32, head_bias=added)
        for added in (None, bias)
    )
    tokens, features = torch.arange(NUM_PAIRS).int(), tables[1, :NUM_PAIRS]
    form = Form(logit_scale=0.5, logit_cap=3.0)
    layer = DraftLayer(config, biased, target_form=form)
    assert not layer.has_maxima and DraftLayer(config, plain).has_maxima
    logits = []
    for one in (DraftLayer(config, plain), layer):
        forward(one, tokens, features)
        logits.append(one.activations(NUM_PAIRS, NUM_PAIRS).logits[:NUM_PAIRS])
    assert error(logits[1], 3.0 * torch.tanh(0.5 * (logits[0] + bias) / 3.0)) < 1e-6


def test_the_targets_rotary_table_is_used_where_it_is_the_same(model: ModelConfig) -> None:
    config = DraftConfig.for_target(model, "eagle2", name="x")
    tensors = random_draft_tensors(config, torch.float32)
    tables = torch.zeros(2, VOCAB, model.hidden_size)
    weights = pack_weights(config, tensors, *tables, torch.float32)
    theirs = RotaryTable(model, model.head_dim, Device())
    layer = DraftLayer(config, weights, ropes=[theirs])
    assert layer.reserve(300) and not layer.reserve(512) and layer.reserve(513)
    assert layer._cos_sin is theirs.reaching(0)
    other = RotaryTable(replace(model, rope_theta=5e5), model.head_dim, Device())
    layer = DraftLayer(config, weights, ropes=[other])
    assert layer.reserve(300) and len(other.reaching(0)) == 0


def test_heads_larger_than_kernels_take(model: ModelConfig) -> None:
    config = DraftConfig.for_target(replace(model, head_dim=320), "eagle2", name="x")
    tensors = random_draft_tensors(config, torch.float32)
    with pytest.raises(ValueError, match="head_dim: .* at most 256, the model has 320"):
        pack_weights(config, tensors, *torch.zeros(2, VOCAB, 64), torch.float32)
