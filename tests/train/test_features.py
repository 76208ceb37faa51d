"""Features on line and from the disk: equal to the engine's taps, and there after any mishap."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specrt.builtin import target_path
from specrt.cache import CacheBatch
from specrt.config import ModelConfig
from specrt.models.llama import FINAL_TAP, LlamaModel, layer_tap
from specrt.models.loader import load_weights
from specrt.train.cache_index import INDEX
from specrt.train.data import DataReport, Dataset
from specrt.train.feature_cache import CachedFeatures, CacheKey, cache_features
from specrt.train.features import FeatureSource, FeatureSubset, OnlineFeatures, Sample
from specrt.train.frozen import PackedTarget, TransformersTarget, load_frozen_target
from specrt.types import CheckpointError
from tests.checkpoints import FAMILIES, edit_tensors, make_checkpoint, store_as_float8

LENGTHS = (5, 1, 140, 17, 30, 8, 64, 2)
VOCAB = 97


def make_dataset(*, vocab: int = VOCAB, seed: int = 0, max_length: int = 140) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    offsets = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
    return Dataset(
        token_ids=torch.randint(vocab, (total,), generator=generator, dtype=torch.int32),
        loss_mask=torch.rand(total, generator=generator) < 0.5,
        offsets=offsets,
        max_length=max_length,
        report=DataReport(),
    )


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


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, of the worst row."""
    got, wanted = got.float(), wanted.float()
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path)
    return path


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


# --- cached ---------------------------------------------------------------------------------------

SHARD_BYTES = 6000  # of at most 45 tokens: six shards


def cache(path: Path, target: Path, dataset: Dataset | None = None, **more: Any) -> CachedFeatures:
    options = {"shard_bytes": SHARD_BYTES, **more}
    return cache_features(path, dataset or make_dataset(), target, **options)


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("shard-*.safetensors"))


def assert_same(got: list[Sample], wanted: list[Sample], precision: float) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        assert torch.equal(one.loss_mask, other.loss_mask)
        assert error(one.features, other.features) < precision


class Passes:
    """Counts sequences that went through the target, and may fail at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.num_sequences = 0
        self.fail_at = fail_at
        inner = PackedTarget.features

        def features(target: PackedTarget, sequences: Any) -> list[torch.Tensor]:
            self.num_sequences += len(sequences)
            if self.fail_at is not None and self.num_sequences >= self.fail_at:
                raise KeyboardInterrupt
            return inner(target, sequences)

        monkeypatch.setattr(PackedTarget, "features", features)


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-6)], ids=str
)
def test_cached_features_are_those_on_line(
    tmp_path: Path, target: Path, dtype: torch.dtype, precision: float
) -> None:
    dataset, told = make_dataset(), []
    cached = cache(tmp_path, target, features_dtype=dtype, on_tokens=told.append)
    assert len(shards(tmp_path)) > 3 and not list(tmp_path.glob("*.partial"))
    assert sum(told) == sum(LENGTHS)
    assert (len(cached), cached.lengths, cached.hidden_size) == (8, list(LENGTHS), 64)
    order = [7, 0, 2, 2, 5, 1, 3, 4, 6]
    samples = cached.batch(order)
    assert samples[0].features.dtype == dtype
    assert samples[0].token_ids.dtype == torch.int64 and samples[0].loss_mask.dtype == torch.bool
    assert_same(samples, OnlineFeatures(dataset, target).batch(order), precision)
    with pytest.raises(IndexError):
        cached.batch([8])


def test_a_finished_cache_is_opened_not_computed(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path, target)
    passes, told = Passes(monkeypatch), []
    cache(tmp_path, target, on_tokens=told.append, shard_bytes=100)
    assert passes.num_sequences == 0
    assert told == [sum(LENGTHS)]
    key = CacheKey.make(make_dataset(), target)
    assert CachedFeatures(tmp_path, key).key == key


def test_many_shards_are_not_mapped_at_once(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specrt.train.feature_cache._MAX_OPEN", 2)
    cached = cache(tmp_path, target)
    assert_same(
        cached.batch(range(8)), OnlineFeatures(make_dataset(), target).batch(range(8)), 4e-3
    )
    assert len(cached._open) == 2


def test_a_killed_run_goes_on(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cache(tmp_path / "whole", target)
    passes = Passes(monkeypatch, fail_at=5)
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path / "cut", target)
    num_whole = len(shards(tmp_path / "cut"))
    assert 0 < num_whole < len(shards(tmp_path / "whole"))
    with pytest.raises(CheckpointError, match=rf"{num_whole} of \d shards are there"):
        CachedFeatures(tmp_path / "cut")
    (tmp_path / "cut" / "shard-00000.safetensors.partial").write_bytes(b"half")
    passes.fail_at, passes.num_sequences = None, 0
    resumed = cache(tmp_path / "cut", target)
    assert 0 < passes.num_sequences < len(LENGTHS)
    assert not list((tmp_path / "cut").glob("*.partial"))
    for one, other in zip(resumed.batch(range(8)), whole.batch(range(8)), strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, file.stat().st_size - 1),
        lambda file: os.truncate(file, 5),
        lambda file: os.truncate(file, 0),
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.with_name("shard-00000.safetensors").read_bytes()),
    ],
    ids=["short", "no header", "empty", "gone", "another's"],
)
def test_a_damaged_shard_is_made_again(
    tmp_path: Path, target: Path, damage: Callable[[Path], None]
) -> None:
    wanted = cache(tmp_path, target).batch(range(8))
    damage(shards(tmp_path)[1])
    with pytest.raises(CheckpointError, match=r"of \d shards are there; cache the features again"):
        CachedFeatures(tmp_path)
    for one, other in zip(cache(tmp_path, target).batch(range(8)), wanted, strict=True):
        assert all(map(torch.equal, one, other))


def test_features_that_are_nan_are_not_kept(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "broken")
    edit_tensors(tmp_path / "broken", lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    with pytest.raises(CheckpointError, match="broken: NaN or infinite features of example 0"):
        cache(tmp_path / "features", tmp_path / "broken")
    assert not shards(tmp_path / "features")


def test_cached_taps_are_those_on_line(tmp_path: Path, target: Path) -> None:
    """A cache with more taps serves those who want fewer; one with fewer is refused."""
    features, order = tmp_path / "features", [7, 0, 2, 5, 1, 3, 4, 6]
    more = {"features_dtype": torch.float32}
    for taps in ((1, 2), (2,), (1,), ()):
        wanted = OnlineFeatures(make_dataset(), target, taps=taps).batch(order)
        got = cache(features, target, taps=taps, **more).batch(order)
        assert_same(got, wanted, 1e-6)
    cache(tmp_path / "one", target, taps=(2,), **more)
    with pytest.raises(CheckpointError, match=r"taps is \(2,\), expected \(1,\)"):
        cache(tmp_path / "one", target, taps=(1,), **more)


def test_a_cache_without_the_field_has_no_taps(tmp_path: Path, target: Path) -> None:
    wanted = cache(tmp_path, target).batch(range(8))
    data = json.loads((tmp_path / INDEX).read_text())
    del data["key"]["taps"], data["crc32"]  # as written before there were any
    (tmp_path / INDEX).write_text(json.dumps(data))
    assert CachedFeatures(tmp_path).key.taps == ()
    assert_same(cache(tmp_path, target).batch(range(8)), wanted, 1e-6)


# --- a full disk ----------------------------------------------------------------------------------


def test_a_disk_that_fills_up_stops_cleanly(
    tmp_path: Path, target: Path, small_files: Callable[[int], None]
) -> None:
    small_files(12_000)  # the shard of the long example is larger
    with pytest.raises(OSError, match="disk full") as stopped:
        cache(tmp_path, target)
    small_files(resource.RLIM_INFINITY)
    assert stopped.value.errno == errno.ENOSPC
    assert stopped.value.filename == str(tmp_path)
    # 267 tokens of 64 halves, an id and a mask: 133 bytes each.
    assert "need 0.04 MB" in str(stopped.value) and "(1 of 6 shards)" in str(stopped.value)
    assert len(shards(tmp_path)) == 1 and not list(tmp_path.glob("*.partial"))
    assert_same(
        cache(tmp_path, target).batch(range(8)),
        OnlineFeatures(make_dataset(), target).batch(range(8)),
        4e-3,
    )


def test_a_disk_too_small_is_said_before_the_work(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"disk full.*\(0 of 6 shards\), 0.00 MB are free; make room"):
        cache(tmp_path, target)
    assert passes.num_sequences == 0


# --- another target or other data -----------------------------------------------------------------


def test_a_cache_of_something_else_is_refused(tmp_path: Path, target: Path) -> None:
    features = tmp_path / "features"
    cache(features, target)
    before = {file: file.stat().st_mtime_ns for file in features.iterdir()}

    def refused(match: str, at: Path = target, **more: Any) -> None:
        with pytest.raises(CheckpointError, match=f"{features}: .*{match}.*another directory"):
            cache(features, at, **more)

    refused("data_hash", dataset=make_dataset(seed=1))
    refused("max_length is 140, expected 150", dataset=make_dataset(max_length=150))
    refused("features_dtype is bfloat16, expected float32", features_dtype=torch.float32)
    refused("another target: target_dtype", dtype=torch.bfloat16)
    make_checkpoint("llama", tmp_path / "deeper", num_hidden_layers=4)
    refused("another target: target_fingerprint", tmp_path / "deeper")
    make_checkpoint("llama", tmp_path / "tuned")
    edit_tensors(tmp_path / "tuned", lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    refused("another target: target_weights", tmp_path / "tuned")
    assert {file: file.stat().st_mtime_ns for file in features.iterdir()} == before


def test_a_moved_target_is_the_same(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "old")
    cache(tmp_path / "features", tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert len(cache(tmp_path / "features", tmp_path / "new")) == len(LENGTHS)


def test_directories_that_are_no_caches(tmp_path: Path, target: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no cached features"):
        CachedFeatures(tmp_path)
    (tmp_path / "shard-00000.safetensors").touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path}: has shards but no {INDEX}"):
        cache(tmp_path, target)
    for content, message in (
        ("{", "cannot be read as JSON"),
        ('{"format_version": 99}', "this version reads 1, got 99"),
        ('{"format_version": 1}', "no index of cached features"),
        (json.dumps({"format_version": 1, "key": {"a": 1}}), "no index of cached features"),
    ):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(CheckpointError, match=message):
            cache(tmp_path, target)
