"""Rotary tables that grow with their sequences: bits, limits, captured steps."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config, StableLmConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

from specrt.cache import CacheBatch, KVCache
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.rope import RotaryTable, rope_table
from specrt.tree import chain_tree
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")
TEXT = [(7 * i * i + i) % 97 for i in range(700)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Weights]:
    path: Path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama3", path, max_position_embeddings=2**30)
    config = ModelConfig.from_directory(path)
    return config, load_weights(path, config, torch.float32)


@pytest.mark.parametrize("head_dim", [10, 16, 128])
def test_bits_of_a_row_do_not_depend_on_how_a_table_grew(
    loaded: tuple[ModelConfig, Weights], head_dim: int
) -> None:
    config = replace(loaded[0], head_dim=head_dim)
    whole = rope_table(head_dim, config.rope_theta, 5000, config.rope_scaling)
    table, given = RotaryTable(config, head_dim, Device()), []
    for wanted, size in ((1, 128), (128, 128), (129, 256), (200, 256), (4097, 8192)):
        rows = table.reaching(wanted)
        assert rows.shape == (size, head_dim)
        given.append((rows, rows.clone()))
    assert torch.equal(rows[:5000], whole)
    for wanted in (1, 127, 129, 3000):
        assert torch.equal(
            rope_table(head_dim, config.rope_theta, wanted, config.rope_scaling), whole[:wanted]
        )
    for rows, before in given:
        assert torch.equal(rows, before)


def test_no_table_is_longer_than_its_context(loaded: tuple[ModelConfig, Weights]) -> None:
    table = RotaryTable(replace(loaded[0], max_positions=500), 16, Device())
    assert table.limit == 628
    assert len(table.reaching(513)) == len(table.reaching(10**12)) == 628


def test_what_is_put_into_a_padded_head_is_not_turned() -> None:
    plain, padded = rope_table(10, 1e4, 300), rope_table(10, 1e4, 300, padded_head_dim=16)
    cosines, sines = padded.chunk(2, dim=1)
    assert torch.equal(torch.cat([cosines[:, :5], sines[:, :5]], dim=1), plain)
    assert bool((cosines[:, 5:] == 1).all()) and bool((sines[:, 5:] == 0).all())


YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 128}
THEIRS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {**YARN, "factor": 4.0},
    {**YARN, "factor": 16.0, "beta_fast": 20.0, "beta_slow": 0.5, "attention_factor": 1.4},
    {**YARN, "factor": 8.0, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.4},
    {**YARN, "factor": 2.0, "beta_fast": 1.0, "beta_slow": 1.0},  # a ramp of no width
    {**LONG, "factor": 4.0},
    {**LONG, "attention_factor": 1.25},
]


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda one: one["rope_type"])
@pytest.mark.parametrize(("head_dim", "part"), [(32, 1.0), (64, 0.25), (80, 0.5)])
def test_angles_are_those_of_transformers(
    theirs: dict[str, Any], head_dim: int, part: float
) -> None:
    """Of what the configuration comes to, and of all of a head or a part."""
    size, generator = int(head_dim * part), random.Random(head_dim)
    if theirs["rope_type"] == "longrope":
        factors = [[1 + 3 * generator.random() for _ in range(size // 2)] for _ in range(2)]
        theirs = theirs | {"short_factor": factors[0], "long_factor": factors[1]}
    rope = {**theirs, "rope_theta": 5000.0, "partial_rotary_factor": part}
    kind = theirs["rope_type"]
    family, make = ("phi3", Phi3Config) if kind == "longrope" else ("stablelm", StableLmConfig)
    data = {
        "model_type": family,
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": rope,
    }
    if kind == "longrope":
        data["original_max_position_embeddings"] = LONG["original_max_position_embeddings"]
    init = StableLmRotaryEmbedding.compute_default_rope_parameters
    frequencies, factor = ROPE_INIT_FUNCTIONS.get(kind, init)(make(**data))
    sizes = {"vocab_size": 97, "intermediate_size": 64, "num_hidden_layers": 1}
    config = ModelConfig.from_dict({**data, **sizes})
    cosines, sines = RotaryTable(config, head_dim, Device()).reaching(400).chunk(2, dim=1)
    angles = torch.arange(len(cosines))[:, None] * frequencies.double()
    turned = size // 2
    # Their frequencies are float32's, and so are off by 1e-7 of an angle.
    bound = 1e-6 + 4e-7 * angles.abs() * factor
    for ours, expected in ((cosines, angles.cos()), (sines, angles.sin())):
        assert bool(((ours[:, :turned] - factor * expected).abs() <= bound).all())
    assert bool((cosines[:, turned:] == 1).all()) and bool((sines[:, turned:] == 0).all())


class Run:
    """A model over one cache, its steps captured."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.model = LlamaModel(config, weights)
        self.cache: KVCache = self.model.new_cache()
        self.cache.close(self.cache.open(1000))  # or the pages would move too

    def logits(self, text: list[int]) -> torch.Tensor:
        sequence = self.cache.open(len(text) + 1)
        batch = CacheBatch(self.cache, [sequence])
        for _ in self.model.extend(text[:-1], batch):
            pass
        root = torch.tensor([text[-1:]], dtype=torch.int32)
        logits = self.model.forward(chain_tree(root), batch).logits.clone()
        self.cache.close(sequence)
        return logits


def test_steps_captured_before_a_table_grew(loaded: tuple[ModelConfig, Weights]) -> None:
    config, weights = loaded
    run = Run(config, weights)
    short = run.logits(TEXT[:200])
    before, version = run.model._cos_sin["main"], run.model.device.version
    assert len(before) == 512  # of a context of 2**30
    long = run.logits(TEXT)
    assert len(run.model._cos_sin["main"]) == 1024 and run.model.device.version > version
    before.fill_(float("nan"))  # nobody may read it any more
    assert torch.equal(run.logits(TEXT[:200]), short)
    small = replace(config, max_positions=1000)
    assert torch.equal(Run(small, weights).logits(TEXT), long)


def test_models_share_what_is_the_same(loaded: tuple[ModelConfig, Weights]) -> None:
    """One that keeps a shorter table is not disturbed when the other one needs more."""
    config, weights = loaded
    target = Run(config, weights)
    drafter = LlamaModel(replace(config, max_positions=300), weights, ropes=target.model.ropes)
    assert list(drafter.ropes) == list(target.model.ropes)
    batch = CacheBatch(cache := drafter.new_cache(), [cache.open(90)])
    root = torch.tensor([[5]], dtype=torch.int32)
    expected = drafter.forward(chain_tree(root), batch).logits.clone()
    version, rows = drafter.device.version, drafter._cos_sin["main"]
    target.logits(TEXT)
    assert torch.equal(drafter.forward(chain_tree(root), batch).logits, expected)
    assert drafter.device.version == version and drafter._cos_sin["main"] is rows
    other = replace(config, rope_theta=1e4)
    assert LlamaModel(other, weights, ropes=target.model.ropes).ropes != target.model.ropes
