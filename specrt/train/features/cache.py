"""Features computed once and kept on disk, in shards that are mapped when read.

A run that was killed, or stopped because the disk was full, goes on with the first shard that is
not there.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from specrt.device import Device
from specrt.train.data.dataset import Dataset
from specrt.train.device import TrainDevice
from specrt.train.features.cache_index import INDEX, CacheIndex, CacheKey
from specrt.train.features.frozen import FrozenTarget, load_frozen_target, passes
from specrt.train.features.source import Sample
from specrt.train.loop.lock import hold_directory
from specrt.types import CheckpointError

__all__ = ["CacheKey", "CachedFeatures", "cache_features"]

_ROWS = ("token_ids", "loss_mask", "features")
"""The tensors of a shard with a row for each token."""
_CHECKSUMS = "crc32"
_SHARD_BYTES = 64 << 20
_MAX_OPEN = 64  # shards that stay mapped


class CachedFeatures:
    """Reads a finished cache; pages are mapped, so it may be larger than memory.

    Args:
        directory: where :func:`cache_features` put it.
        key: refuse a cache of anything else. One with more taps will do; samples have those of
            the key.

    Raises:
        CheckpointError: no cache, an unfinished or broken one, or one of another target, data or
            length.
    """

    def __init__(self, directory: str | os.PathLike[str], key: CacheKey | None = None) -> None:
        self._index = CacheIndex.read(Path(directory))
        if key is not None:
            self._index.check(key)
        self._wanted = None if key is None else self._index.columns(key.taps)
        if missing := self._index.missing():
            num_whole = self._index.num_shards - len(missing)
            raise CheckpointError(
                f"{directory}: {num_whole} of {self._index.num_shards} shards are there; "
                "cache the features again to go on"
            )
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._checked: set[int] = set()
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
        """The samples of these indices, features in the dtype they are stored in.

        Raises:
            CheckpointError: a sample is not what was written, as told when it is first read.
        """
        return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0..{len(self) - 1}, got {index}")
        shard = self._index.shard_of(index)
        try:
            token_ids, loss_mask, features = self._stored(index, shard)
        except SafetensorError as error:
            raise self._damaged(shard, str(error)) from error
        return Sample(
            token_ids.long(),
            loss_mask.bool(),
            # Either copies: a view would keep the shard mapped.
            features.clone() if self._wanted is None else features[:, self._wanted],
        )

    def _stored(self, index: int, shard: int) -> list[torch.Tensor]:
        """One sample's rows of the shard's tensors."""
        place, file = index - self._index.borders[shard], self._file(shard)
        first = self._starts[index - place]
        rows = slice(self._starts[index] - first, self._starts[index + 1] - first)
        stored = [file.get_slice(name)[rows] for name in _ROWS]
        names = file.keys()  # shards of earlier versions have no checksums
        if index not in self._checked and _CHECKSUMS in names:
            if _checksum(stored) != int(file.get_slice(_CHECKSUMS)[place]):
                raise self._damaged(shard, f"the checksum of example {index} is another")
            self._checked.add(index)
        return stored

    def _damaged(self, shard: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._index.shard_path(shard)}: damaged: {reason}; remove this file, and the same "
            "command computes it anew"
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
    taps: tuple[int, ...] = (),
    adapter: str | os.PathLike[str] | None = None,
    features_dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = _SHARD_BYTES,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
) -> CachedFeatures:
    """Compute the features of a data set that are not there yet, and open them.

    One process at a time may write to a directory; any number may read a finished one.

    Args:
        directory: of the cache; made where it is missing.
        dataset: the data.
        target_path: the target's directory.
        dtype: of the target's weights; the checkpoint's by default.
        device: where to run the target.
        taps, adapter: as for :func:`load_frozen_target`.
        features_dtype: what is stored.
        shard_bytes: about the size of a shard; what is there keeps the size it was begun with.
        on_tokens: called with the number of tokens that became ready, those found there first.

    Raises:
        CheckpointError: the directory holds a cache of something else, or the target is broken or
            gives NaN.
        OSError: no space left (the message says how much is needed and how far it came; what is
            written stays and the next call goes on), or the directory cannot be written.
        ValueError: an example does not fit the target's vocabulary or context, or another process
            is writing there.
    """
    root = Path(directory)
    key = CacheKey.make(dataset, target_path, dtype, features_dtype, taps, adapter)
    if _is_finished(root, key):
        on_tokens(sum(dataset.lengths))
        return CachedFeatures(root, key)
    with hold_directory(root):
        index = _begun(root, key, dataset, shard_bytes)
        missing = index.missing()
        on_tokens(index.num_tokens - sum(map(index.tokens_of, missing)))
        index.check_space(missing)
        target = load_frozen_target(target_path, dtype, device, index.key.taps, adapter)
        pass_tokens = TrainDevice(Device(torch.device(device))).pass_tokens
        for shard in missing:
            tensors = _compute(index, shard, dataset, target, on_tokens, pass_tokens)
            index.write_shard(shard, tensors)
    return CachedFeatures(root, key)


def _is_finished(root: Path, key: CacheKey) -> bool:
    if not (root / INDEX).exists():
        return False
    index = CacheIndex.read(root)
    index.check(key)
    return not index.missing()


def _begun(root: Path, key: CacheKey, dataset: Dataset, shard_bytes: int) -> CacheIndex:
    """The index of a cache that is there, or of a new one; what a kill left half is removed."""
    if (root / INDEX).exists():
        index = CacheIndex.read(root)
        index.check(key)
    else:
        if any(root.glob("shard-*")):
            raise CheckpointError(f"{root}: has shards but no {INDEX}: not a cache of ours")
        index = CacheIndex.plan(root, key, dataset.lengths, shard_bytes)
        index.write()
    for partial in root.glob("*.partial"):
        partial.unlink()
    return index


def _compute(
    index: CacheIndex,
    shard: int,
    dataset: Dataset,
    target: FrozenTarget,
    on_tokens: Callable[[int], None],
    pass_tokens: int,
) -> dict[str, torch.Tensor]:
    """The tensors of one shard."""
    dtype = getattr(torch, index.key.features_dtype)
    examples = [dataset[i] for i in range(index.borders[shard], index.borders[shard + 1])]
    features = []
    for part in passes([len(example.token_ids) for example in examples], pass_tokens):
        rows = target.features([example.token_ids for example in examples[part]])
        features += [row.to("cpu", dtype) for row in rows]
        on_tokens(sum(map(len, rows)))
    for number, rows_of_one in enumerate(features, start=index.borders[shard]):
        if not bool(torch.isfinite(rows_of_one).all()):
            raise CheckpointError(
                f"{index.key.target_name}: NaN or infinite features of example {number}"
            )
    stored = [
        (example.token_ids.int(), example.loss_mask.to(torch.uint8), rows_of_one)
        for example, rows_of_one in zip(examples, features, strict=True)
    ]
    lengths = torch.tensor([0, *map(len, features)], dtype=torch.int64)
    return {
        **{name: torch.cat([rows[i] for rows in stored]) for i, name in enumerate(_ROWS)},
        "offsets": lengths.cumsum(0),
        _CHECKSUMS: torch.tensor([_checksum(rows) for rows in stored], dtype=torch.int64),
    }


def _checksum(rows: Iterable[torch.Tensor]) -> int:
    """CRC-32 of one sample as it is stored."""
    value = 0
    for tensor in rows:
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, value)
    return value
