"""Rotary tables that grow with their sequences: bits, limits, captured steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

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
