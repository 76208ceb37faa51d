"""Features on the disk: those on line, there after any mishap, and of nothing else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specrt.train.data.dataset import Dataset
from specrt.train.features.cache import CachedFeatures, CacheKey, cache_features
from specrt.train.features.cache_index import INDEX
from specrt.train.features.frozen import PackedTarget
from specrt.train.features.source import OnlineFeatures, Sample
from specrt.train.loop.lock import hold_directory
from specrt.types import CheckpointError
from tests.checkpoints import edit_tensors, make_checkpoint
from tests.train.feature_support import LENGTHS, error, make_dataset

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
    monkeypatch.setattr("specrt.train.features.cache._MAX_OPEN", 2)
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


def test_a_flipped_bit_of_a_shard_is_found(tmp_path: Path, target: Path) -> None:
    wanted = cache(tmp_path, target).batch(range(8))
    shard = shards(tmp_path)[0]
    content = shard.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(header, len(content), 97), content.index(b"loss_mask"), content.index(b"BF16")]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1
        shard.write_bytes(flipped)
        with contextlib.suppress(CheckpointError):
            got = CachedFeatures(tmp_path).batch(range(8))
            for one, other in zip(got, wanted, strict=True):  # only what is not read may change
                assert all(map(torch.equal, one, other)), place
    flipped = bytearray(content)
    first = wanted[0].features.view(torch.uint8).numpy().tobytes()
    flipped[content.index(first)] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=f"{shard}: damaged: the checksum of example 0"):
        CachedFeatures(tmp_path).batch([0])
    shard.unlink()  # as the message says
    for one, other in zip(cache(tmp_path, target).batch(range(8)), wanted, strict=True):
        assert all(map(torch.equal, one, other))


def test_shards_without_checksums_are_read(tmp_path: Path, target: Path) -> None:
    """As those of earlier versions."""
    wanted = cache(tmp_path, target).batch(range(8))
    for shard in shards(tmp_path):
        tensors = load_file(shard)
        del tensors["crc32"]
        save_file(tensors, shard)
    for one, other in zip(cache(tmp_path, target).batch(range(8)), wanted, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_flipped_bit_of_the_index_is_found(tmp_path: Path, target: Path) -> None:
    whole, content = cache(tmp_path, target), (tmp_path / INDEX).read_bytes()
    digits = content.index(b'"lengths": [') + 12
    for place in (digits, *range(0, len(content), 7)):
        flipped = bytearray(content)
        flipped[place] ^= 1
        (tmp_path / INDEX).write_bytes(flipped)
        if place == digits:
            with pytest.raises(CheckpointError, match=f"{tmp_path / INDEX}: damaged"):
                CachedFeatures(tmp_path)
        with contextlib.suppress(CheckpointError):  # but for spaces, and the checksum's own name
            got = CachedFeatures(tmp_path)
            assert (got.key, got.lengths) == (whole.key, whole.lengths)


def test_a_cache_has_one_writer_and_many_readers(tmp_path: Path, target: Path) -> None:
    with hold_directory(tmp_path):
        with pytest.raises(ValueError, match=f"{tmp_path}: process {os.getpid()} on"):
            cache(tmp_path, target)
        assert not (tmp_path / INDEX).exists()
    cache(tmp_path, target)
    with hold_directory(tmp_path):
        assert len(cache(tmp_path, target)) == len(LENGTHS)


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
