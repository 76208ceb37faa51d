"""Features on line and from the disk: equal to the engine's taps, and there after any mishap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from specrt.builtin import target_path
from specrt.cache import CacheBatch
from specrt.config import ModelConfig
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.step import FINAL_TAP, layer_tap
from specrt.train.data.dataset import Dataset
from specrt.train.features.frozen import PackedTarget, TransformersTarget, load_frozen_target
from specrt.train.features.source import FeatureSource, FeatureSubset, OnlineFeatures
from tests.checkpoints import FAMILIES, make_checkpoint, store_as_float8
from tests.gguf_files import write_gguf
from tests.train.feature_support import LENGTHS, error, make_dataset


def engine_features(
    path: Path, dtype: torch.dtype, dataset: Dataset, tap: str = FINAL_TAP
) -> list[torch.Tensor]:
    """What the engine taps, ``[n, H]`` of each example."""
    config = ModelConfig.from_directory(path)
    model = LlamaModel(config, load_weights(path, config, dtype))
    cache, found = model.new_cache(), []
    for index in range(len(dataset)):
        ids = dataset[index].token_ids.tolist()
        sequence = cache.open(len(ids) + 128)
        pieces = model.extend(ids, CacheBatch(cache, [sequence]), taps=(tap,))
        found.append(torch.cat([taps[tap][0].clone() for _, taps in pieces]))
        cache.close(sequence)
    return found


# --- on line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_engines_taps(tmp_path: Path, family: str) -> None:
    make_checkpoint(family, tmp_path)
    dataset = make_dataset()
    source = OnlineFeatures(dataset, tmp_path)
    samples = source.batch(range(len(dataset)))
    for sample, wanted in zip(
        samples, engine_features(tmp_path, torch.float32, dataset), strict=True
    ):
        assert error(sample.features, wanted) < 1e-5


def test_features_are_the_engines_taps_on_bfloat16_weights(tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path, dtype=torch.bfloat16)
    dataset = make_dataset()
    samples = OnlineFeatures(dataset, tmp_path).batch(range(len(dataset)))
    wanted = engine_features(tmp_path, torch.bfloat16, dataset)
    assert max(error(s.features, w) for s, w in zip(samples, wanted, strict=True)) < 1e-3


def test_features_of_the_bundled_target() -> None:
    dataset = make_dataset(vocab=4096)
    samples = OnlineFeatures(dataset, target_path()).batch([0, 2])
    wanted = engine_features(target_path(), torch.bfloat16, dataset)
    assert samples[0].features.dtype == torch.float32
    assert error(samples[0].features, wanted[0]) < 1e-3
    assert error(samples[1].features, wanted[2]) < 1e-3


def test_features_of_blocks(tmp_path: Path) -> None:
    """They stand for their own values, whatever dtype the rest of the file has."""
    make_checkpoint("llama", tmp_path, intermediate_size=128)
    file, dataset = tmp_path / "model.gguf", make_dataset()
    write_gguf(tmp_path, file, kind="Q4_1")
    samples = OnlineFeatures(dataset, file).batch(range(len(dataset)))
    wanted = engine_features(file, torch.float16, dataset)
    assert max(error(s.features, w) for s, w in zip(samples, wanted, strict=True)) < 4e-3
    rounded = engine_features(tmp_path, torch.float32, dataset)
    assert max(error(s.features, w) for s, w in zip(samples, rounded, strict=True)) > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_features_through_transformers_are_those_behind_the_final_norm(
    tmp_path: Path, family: str
) -> None:
    make_checkpoint(family, tmp_path)
    config, dataset = ModelConfig.from_directory(tmp_path), make_dataset()
    target = TransformersTarget(tmp_path, config, torch.float32, torch.device("cpu"))
    sequences = [dataset[index].token_ids for index in range(len(dataset))]
    features = target.features(sequences)
    full = AutoModelForCausalLM.from_pretrained(tmp_path)
    packed = PackedTarget(tmp_path, config, torch.float32, torch.device("cpu"))
    for ids, got, other in zip(sequences, features, packed.features(sequences), strict=True):
        with torch.no_grad():
            logits = full(ids[None]).logits[0]
            # The LM head multiplies the feature, so it is the one behind the norm.
            assert torch.allclose(full.lm_head(got), logits, atol=1e-4)
        assert error(got, other) < 1e-5


def test_the_place_of_the_target_chooses_its_reader(tmp_path: Path, target: Path) -> None:
    assert isinstance(load_frozen_target(target), PackedTarget)
    assert isinstance(load_frozen_target(target, device="meta"), TransformersTarget)
    make_checkpoint("llama", tmp_path)
    store_as_float8(tmp_path)  # transformers cannot read it
    assert isinstance(load_frozen_target(tmp_path, device="meta"), PackedTarget)


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_the_engines_layers(tmp_path: Path, family: str) -> None:
    make_checkpoint(family, tmp_path)
    dataset = make_dataset()
    samples = OnlineFeatures(dataset, tmp_path, taps=(1, 2)).batch(range(len(dataset)))
    taps = (layer_tap(0), layer_tap(1), FINAL_TAP)
    columns = [engine_features(tmp_path, torch.float32, dataset, tap) for tap in taps]
    for sample, *wanted in zip(samples, *columns, strict=True):
        for got, layer in zip(sample.features.chunk(3, -1), wanted, strict=True):
            assert error(got, layer) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_taps_through_transformers_are_the_same(tmp_path: Path, family: str) -> None:
    make_checkpoint(family, tmp_path)
    config, dataset = ModelConfig.from_directory(tmp_path), make_dataset()
    sequences = [dataset[index].token_ids for index in range(len(dataset))]
    place = torch.float32, torch.device("cpu"), (2,)
    features = TransformersTarget(tmp_path, config, *place).features(sequences)
    others = PackedTarget(tmp_path, config, *place).features(sequences)
    for got, other in zip(features, others, strict=True):
        assert got.shape[1] == 128
        assert max(map(error, got.chunk(2, -1), other.chunk(2, -1))) < 1e-5


@pytest.mark.parametrize("taps", [(0,), (3,), (2, 1), (1, 1)])
def test_taps_out_of_range(target: Path, taps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"taps: expected increasing numbers of 1\.\.2, got"):
        load_frozen_target(target, taps=taps)


def test_features_can_be_trained_on(target: Path) -> None:
    (sample,) = OnlineFeatures(make_dataset(), target).batch([0])
    weight = torch.zeros(64, 64, requires_grad=True)
    (sample.features @ weight).sum().backward()
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0
    assert not sample.features.requires_grad


def test_a_batch_is_in_the_order_asked_for(target: Path) -> None:
    dataset = make_dataset()
    source = OnlineFeatures(dataset, target)
    assert (len(source), source.lengths, source.hidden_size) == (8, list(LENGTHS), 64)
    assert source.batch([]) == []
    together = source.batch([3, 0, 3])
    for index, sample in zip((3, 0, 3), together, strict=True):
        (alone,) = source.batch([index])
        assert torch.equal(sample.token_ids, dataset[index].token_ids)
        assert torch.equal(sample.loss_mask, dataset[index].loss_mask)
        assert error(sample.features, alone.features) < 1e-5


def test_a_subset_has_indices_of_its_own(target: Path) -> None:
    source = OnlineFeatures(make_dataset(), target)
    subset: FeatureSource = FeatureSubset(source, [6, 3])
    assert (len(subset), subset.lengths, subset.hidden_size) == (2, [64, 17], 64)
    first, second = subset.batch([1, 0])
    assert (len(first.token_ids), len(second.token_ids)) == (17, 64)


def test_data_that_does_not_fit_the_target(tmp_path: Path, target: Path) -> None:
    with pytest.raises(ValueError, match=r"token id \d+ is outside the vocabulary 0..96"):
        OnlineFeatures(make_dataset(vocab=4096), target).batch([2])
    make_checkpoint("llama", tmp_path, max_position_embeddings=100)
    with pytest.raises(ValueError, match="140 tokens are more than the target's context of 100"):
        OnlineFeatures(make_dataset(), tmp_path).batch([0, 2])
