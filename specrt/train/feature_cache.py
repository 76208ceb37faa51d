"""Features computed once and kept on disk, in shards that are mapped when read.

A shard is written whole under another name and then renamed, so that whatever carries its own name
is complete. A run that was killed, or stopped because the disk was full, goes on with the next one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from specrt.config import ModelConfig, checkpoint_directory, config_fingerprint, read_json
from specrt.models.checkpoint import Checkpoint
from specrt.train.data import Dataset
from specrt.train.features import Sample
from specrt.train.frozen import FrozenTarget, load_frozen_target
from specrt.types import CheckpointError

FORMAT_VERSION = 1
INDEX = "index.json"

_SHARD_BYTES = 64 << 20
_PASS_TOKENS = 1024  # of a pass through the target: more only leave the caches
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_OPEN = 64  # shards that stay mapped
_PROBE, _NUM_PROBES = 1 << 16, 16


@dataclass(frozen=True)
class CacheKey:
    """What a cache was made of; features of anything else would be silently wrong."""

    target_name: str
    target_fingerprint: str
    """Of the architecture (``config_fingerprint``)."""
    target_weights: str
    """Of the weight files: names, sizes and samples of their content."""
    target_dtype: str
    data_hash: str
    max_length: int
    hidden_size: int
    features_dtype: str

    @classmethod
    def make(
        cls,
        dataset: Dataset,
        target_path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        features_dtype: torch.dtype = torch.bfloat16,
    ) -> CacheKey:
        """The key of a data set and a target; reads little of the weights and computes nothing.

        Raises:
            CheckpointError: the target is missing or broken.
        """
        directory = checkpoint_directory(target_path)
        config = ModelConfig.from_directory(directory)
        return cls(
            target_name=directory.resolve().name,
            target_fingerprint=config_fingerprint(config),
            target_weights=_weights_hash(directory),
            target_dtype=_name(dtype or config.dtype),
            data_hash=dataset.content_hash,
            max_length=dataset.max_length,
            hidden_size=config.hidden_size,
            features_dtype=_name(features_dtype),
        )


class CachedFeatures:
    """Reads a finished cache; pages are mapped, so it may be larger than memory.

    Args:
        directory: where :func:`cache_features` put it.
        key: refuse a cache of anything else.

    Raises:
        CheckpointError: no cache, an unfinished or broken one, or one of another target, data or
            length.
    """

    def __init__(self, directory: str | os.PathLike[str], key: CacheKey | None = None) -> None:
        self._index = _Index.read(Path(directory))
        if key is not None:
            self._index.check(key)
        num_whole = sum(self._index.is_whole(shard) for shard in range(self._index.num_shards))
        if num_whole < self._index.num_shards:
            raise CheckpointError(
                f"{directory}: {num_whole} of {self._index.num_shards} shards are there; "
                "cache the features again to go on"
            )
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._starts = [0]
        for length in self.lengths:
            self._starts.append(self._starts[-1] + length)

    @property
    def key(self) -> CacheKey:
        """What it was made of."""
        return self._index.key

    @property
    def hidden_size(self) -> int:
        """H"""
        return self._index.key.hidden_size

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return self._index.lengths

    def __len__(self) -> int:
        return len(self._index.lengths)

    def batch(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices, features in the dtype they are stored in."""
        return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0..{len(self) - 1}, got {index}")
        shard = self._index.shard_of(index)
        first = self._starts[self._index.borders[shard]]
        rows = slice(self._starts[index] - first, self._starts[index + 1] - first)
        file = self._file(shard)
        return Sample(
            file.get_slice("token_ids")[rows].long(),
            file.get_slice("loss_mask")[rows].bool(),
            file.get_slice("features")[rows].clone(),  # a view would keep the shard mapped
        )

    def _file(self, shard: int) -> Any:
        """A mapped shard; those not read for long are unmapped."""
        if shard not in self._open:
            self._open[shard] = safe_open(self._index.shard_path(shard), framework="pt")
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


def cache_features(
    directory: str | os.PathLike[str],
    dataset: Dataset,
    target_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    features_dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = _SHARD_BYTES,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
) -> CachedFeatures:
    """Compute the features of a data set that are not there yet, and open them.

    One process at a time may write to a directory.

    Args:
        directory: of the cache; made where it is missing.
        dataset: the data.
        target_path: the target's directory.
        dtype: of the target's weights; the checkpoint's by default.
        device: where to run the target.
        features_dtype: what is stored.
        shard_bytes: about the size of a shard; what is there keeps the size it was begun with.
        on_tokens: called with the number of tokens that became ready, those found there first.

    Raises:
        CheckpointError: the directory holds a cache of something else, or the target is broken.
        OSError: no space left (the message says how much is needed and how far it came; what is
            written stays and the next call goes on), or the directory cannot be written.
        ValueError: an example does not fit the target's vocabulary or context.
    """
    root = Path(directory)
    key = CacheKey.make(dataset, target_path, dtype, features_dtype)
    root.mkdir(parents=True, exist_ok=True)
    if (root / INDEX).exists():
        index = _Index.read(root)
        index.check(key)
    else:
        if any(root.glob("shard-*")):
            raise CheckpointError(f"{root}: has shards but no {INDEX}: not a cache of ours")
        index = _Index.plan(root, key, dataset.lengths, shard_bytes)
        index.write()
    for partial in root.glob("*.partial"):
        partial.unlink()
    missing = [shard for shard in range(index.num_shards) if not index.is_whole(shard)]
    on_tokens(index.num_tokens - sum(index.tokens_of(shard) for shard in missing))
    if missing:
        index.check_space(missing)
        target = load_frozen_target(target_path, dtype, device)
        for shard in missing:
            tensors = _compute(index, shard, dataset, target, on_tokens)
            index.write_shard(shard, tensors)
    return CachedFeatures(root, key)


def _compute(
    index: _Index,
    shard: int,
    dataset: Dataset,
    target: FrozenTarget,
    on_tokens: Callable[[int], None],
) -> dict[str, torch.Tensor]:
    """The tensors of one shard."""
    dtype = getattr(torch, index.key.features_dtype)
    examples = [dataset[i] for i in range(index.borders[shard], index.borders[shard + 1])]
    features = []
    for part in _passes([len(example.token_ids) for example in examples]):
        rows = target.features([example.token_ids for example in examples[part]])
        features += [row.to("cpu", dtype) for row in rows]
        on_tokens(sum(map(len, rows)))
    lengths = torch.tensor([0, *map(len, features)], dtype=torch.int64)
    return {
        "features": torch.cat(features),
        "token_ids": torch.cat([example.token_ids for example in examples]).int(),
        "loss_mask": torch.cat([example.loss_mask for example in examples]).to(torch.uint8),
        "offsets": lengths.cumsum(0),
    }


def _passes(lengths: list[int]) -> Iterator[slice]:
    """Neighbours that go through the target together."""
    start, num_tokens = 0, 0
    for end, length in enumerate(lengths):
        if num_tokens and num_tokens + length > _PASS_TOKENS:
            yield slice(start, end)
            start, num_tokens = end, 0
        num_tokens += length
    yield slice(start, len(lengths))


@dataclass(frozen=True)
class _Index:
    """``index.json``: written first, so that a later run cuts the data at the same places."""

    root: Path
    key: CacheKey
    lengths: list[int]
    borders: list[int]
    """The first sample of each shard, and the number of samples."""

    @classmethod
    def plan(cls, root: Path, key: CacheKey, lengths: list[int], shard_bytes: int) -> _Index:
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
    def read(cls, root: Path) -> _Index:
        file = root / INDEX
        if not file.is_file():
            raise CheckpointError(f"{root}: no cached features (no {INDEX})")
        data = read_json(file)
        if data.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format_version: this version reads {FORMAT_VERSION}, "
                f"got {data.get('format_version')!r}"
            )
        try:
            return cls(root, CacheKey(**data["key"]), data["lengths"], data["borders"])
        except (KeyError, TypeError) as error:
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
        self._replace(INDEX, json.dumps(data).encode())

    def check(self, key: CacheKey) -> None:
        """Refuse a cache of something else, naming what differs."""
        for name, wanted in vars(key).items():
            found = vars(self.key)[name]
            if name != "target_name" and found != wanted:
                kind = "target" if name.startswith("target_") else "data set or setting"
                raise CheckpointError(
                    f"{self.root}: features cached for another {kind}: {name} is {found}, "
                    f"expected {wanted}; use another directory or remove this one"
                )

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
        return list(shape) == [self.tokens_of(shard), self.key.hidden_size]

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
        whole = [shard for shard in range(self.num_shards) if self.is_whole(shard)]
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
    return key.hidden_size * dtype.itemsize + 5


def _weights_hash(directory: Path) -> str:
    """Sixteen hex digits of the weight files' names, sizes, headers and samples of their content.

    Reading all of a large target would take minutes; two fine-tunings of one model differ in
    nearly every byte.
    """
    digest = hashlib.sha256()
    files = sorted({info.file for info in Checkpoint(directory).infos.values()})
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for probe in range(_NUM_PROBES):
                stream.seek(size * probe // _NUM_PROBES)
                digest.update(stream.read(_PROBE))
    return digest.hexdigest()[:16]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
