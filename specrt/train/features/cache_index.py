"""What a cache of features is made of and where its shards begin and end.

A shard is written whole under another name and then renamed, so that whatever carries its own name
is complete.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from specrt.config import ModelConfig, checkpoint_path, config_fingerprint, read_json
from specrt.models.opening import weights_hash
from specrt.train.data.dataset import Dataset
from specrt.types import CheckpointError

FORMAT_VERSION = 1
INDEX = "index.json"
_CHECKSUM = "crc32"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class CacheKey:
    """What a cache was made of; features of anything else would be silently wrong."""

    target_name: str
    target_fingerprint: str
    """Of the architecture (``config_fingerprint``)."""
    target_weights: str
    """Of the weight files and a merged adapter's: names, sizes and samples of their content."""
    target_dtype: str
    data_hash: str
    max_length: int
    hidden_size: int
    features_dtype: str
    taps: tuple[int, ...] = ()
    """Layers whose outputs are kept before the final feature (``load_frozen_target``)."""

    @property
    def row_size(self) -> int:
        """Values of one token."""
        return (len(self.taps) + 1) * self.hidden_size

    @classmethod
    def make(
        cls,
        dataset: Dataset,
        target_path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        features_dtype: torch.dtype = torch.bfloat16,
        taps: tuple[int, ...] = (),
        adapter: str | os.PathLike[str] | None = None,
    ) -> CacheKey:
        """The key of a data set and a target; reads little of the weights and computes nothing.

        Raises:
            CheckpointError: the target is missing or broken.
        """
        directory = checkpoint_path(target_path)
        config = ModelConfig.from_directory(directory, adapter=adapter)
        return cls(
            target_name=directory.resolve().name,
            target_fingerprint=config_fingerprint(config),
            target_weights=weights_hash(directory, adapter),
            target_dtype=_name(dtype or config.dtype),
            data_hash=dataset.content_hash,
            max_length=dataset.max_length,
            hidden_size=config.hidden_size,
            features_dtype=_name(features_dtype),
            taps=taps,
        )


@dataclass(frozen=True)
class CacheIndex:
    """``index.json``: written first, so that a later run cuts the data at the same places."""

    root: Path
    key: CacheKey
    lengths: list[int]
    borders: list[int]
    """The first sample of each shard, and the number of samples."""

    @classmethod
    def plan(cls, root: Path, key: CacheKey, lengths: list[int], shard_bytes: int) -> CacheIndex:
        """Cut where a shard would become larger than ``shard_bytes``."""
        limit = max(1, shard_bytes // _token_bytes(key))
        borders, num_tokens = [0], 0
        for sample, length in enumerate(lengths):
            if num_tokens and num_tokens + length > limit:
                borders.append(sample)
                num_tokens = 0
            num_tokens += length
        return cls(root, key, lengths, [*borders, len(lengths)])

    @classmethod
    def read(cls, root: Path) -> CacheIndex:
        file = root / INDEX
        if not file.is_file():
            raise CheckpointError(f"{root}: no cached features (no {INDEX})")
        data = read_json(file)
        checksum = data.pop(_CHECKSUM, None)  # caches of earlier versions have none
        if checksum not in (None, _checksum(data)):
            raise CheckpointError(f"{file}: damaged: not what was written; remove {root}")
        if data.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format_version: this version reads {FORMAT_VERSION}, "
                f"got {data.get('format_version')!r}"
            )
        try:
            key = {**data["key"], "taps": tuple(data["key"].get("taps", ()))}
            index = cls(root, CacheKey(**key), data["lengths"], data["borders"])
            if index.borders != sorted({0, *index.borders, len(index.lengths)}):
                raise ValueError("borders do not rise from 0 to the number of samples")
            return index
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: no index of cached features: {error}") from error

    def write(self) -> None:
        data = {
            "format_version": FORMAT_VERSION,
            "key": vars(self.key),
            "num_examples": len(self.lengths),
            "num_tokens": self.num_tokens,
            "borders": self.borders,
            "lengths": self.lengths,
        }
        self._replace(INDEX, json.dumps({**data, _CHECKSUM: _checksum(data)}).encode())

    def check(self, key: CacheKey) -> None:
        """Refuse a cache of something else, naming what differs; more taps do no harm."""
        for name, wanted in vars(key).items():
            found = vars(self.key)[name]
            is_there = set(wanted) <= set(found) if name == "taps" else found == wanted
            if name != "target_name" and not is_there:
                kind = "target" if name.startswith("target_") else "data set or setting"
                raise CheckpointError(
                    f"{self.root}: features cached for another {kind}: {name} is {found}, "
                    f"expected {wanted}; use another directory or remove this one"
                )

    def columns(self, taps: tuple[int, ...]) -> torch.Tensor | None:
        """Where in a row some of its taps and the feature are; None: they are all of it."""
        if taps == self.key.taps:
            return None
        places = [*map(self.key.taps.index, taps), len(self.key.taps)]
        blocks = torch.arange(self.key.row_size).view(-1, self.key.hidden_size)
        return blocks[places].flatten()

    @property
    def num_shards(self) -> int:
        return len(self.borders) - 1

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def tokens_of(self, shard: int) -> int:
        return sum(self.lengths[self.borders[shard] : self.borders[shard + 1]])

    def shard_of(self, sample: int) -> int:
        return bisect_right(self.borders, sample) - 1

    def shard_path(self, shard: int) -> Path:
        return self.root / f"shard-{shard:05d}.safetensors"

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is there with all its rows; a file cut short is not."""
        try:
            with safe_open(self.shard_path(shard), framework="pt") as file:
                shape = file.get_slice("features").get_shape()
        except (OSError, SafetensorError):
            return False
        return list(shape) == [self.tokens_of(shard), self.key.row_size]

    def missing(self) -> list[int]:
        """The shards that are not there with all their rows."""
        return [shard for shard in range(self.num_shards) if not self.is_whole(shard)]

    def check_space(self, missing: list[int]) -> None:
        """Stop before the work begins if its result cannot be kept."""
        needed = self._bytes(missing)
        if shutil.disk_usage(self.root).free < needed:
            raise self._disk_full()

    def write_shard(self, shard: int, tensors: dict[str, torch.Tensor]) -> None:
        self._replace(self.shard_path(shard).name, save(tensors))

    def _replace(self, name: str, content: bytes) -> None:
        """Write a file that is either whole or not there."""
        partial = self.root / f"{name}.partial"
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.root / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno not in _DISK_FULL:
                raise
            raise self._disk_full() from error

    def _disk_full(self) -> OSError:
        whole = sorted({*range(self.num_shards)} - {*self.missing()})
        free = shutil.disk_usage(self.root).free
        total, done = self._bytes(range(self.num_shards)), self._bytes(whole)
        return OSError(
            errno.ENOSPC,
            f"disk full: the features need {_size(total)}, {_size(done)} are written "
            f"({len(whole)} of {self.num_shards} shards), {_size(free)} are free; make room "
            "and run again to go on from there",
            str(self.root),
        )

    def _bytes(self, shards: Sequence[int]) -> int:
        return _token_bytes(self.key) * sum(map(self.tokens_of, shards))


def _token_bytes(key: CacheKey) -> int:
    """Of one token: features, id and mask."""
    dtype: torch.dtype = getattr(torch, key.features_dtype)
    return key.row_size * dtype.itemsize + 5


def _checksum(data: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
