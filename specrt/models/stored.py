"""A family's checkpoint under our names: tensors renamed, taken apart and turned as they are read.

Nothing is read before it is asked for, and of a matrix that several share only the rows asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from specrt.config import ModelConfig, read_json
from specrt.models.checkpoint import Checkpoint, TensorInfo
from specrt.models.families import EMBED, HEAD, HEADS, WRAPPERS, Naming
from specrt.types import CheckpointError


class View(NamedTuple):
    """Which rows of a stored tensor are a tensor of ours: the same ones of each of its blocks."""

    num_blocks: int
    """Equal parts of the stored rows: 1, or heads."""
    first: int
    """Row of a block."""
    num_rows: int
    """Of each block."""
    is_transposed: bool = False
    """Whether the file has a row as a column."""


class StoredTensor(NamedTuple):
    """A tensor that a checkpoint of a family should have."""

    key: str
    shape: tuple[int, ...]
    """As stored."""
    parts: Mapping[str, View]
    """Ours that it holds."""

    @property
    def is_transposed(self) -> bool:
        """Whether it lies as ``[inputs, outputs]``."""
        return any(view.is_transposed for view in self.parts.values())


def stored_tensors(
    naming: Naming, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[StoredTensor]:
    """What a family's checkpoint should have for tensors of ours.

    Args:
        naming: the family's.
        config: a model of it.
        shapes: of our tensors; those that are stored as one in the order they lie there.
    """
    groups: dict[str, list[str]] = {}
    for key in shapes:
        groups.setdefault(naming.stored(key), []).append(key)
    return [_stored(name, keys, naming, config, shapes) for name, keys in groups.items()]


def _stored(
    name: str,
    keys: list[str],
    naming: Naming,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> StoredTensor:
    module = name.rpartition(".")[0]
    num_rows, width = sum(shapes[key][0] for key in keys), shapes[keys[0]][1:]
    is_transposed = bool(width) and module.endswith(tuple(naming.transposed))
    num_blocks = config.num_kv_heads if module.endswith(tuple(naming.by_head)) else 1
    parts, first = {}, 0
    for key in keys:
        size = shapes[key][0] // num_blocks
        parts[key] = View(num_blocks, first, size, is_transposed)
        first += size
    return StoredTensor(name, (*width, num_rows) if is_transposed else (num_rows, *width), parts)


def use_full_names(checkpoint: Checkpoint, naming: Naming, *, is_head_tied: bool) -> None:
    """Give tensors the names that the family's model with a head has, whoever saved them.

    Args:
        checkpoint: its keys are changed.
        naming: the family's.
        is_head_tied: a head that is stored alone is the embedding too.
    """
    infos = checkpoint.infos
    _take_text_model(checkpoint)
    for other, usual in HEADS.items():
        for key in [key for key in infos if key.startswith(other)]:
            infos[key.replace(other, usual, 1)] = infos.pop(key)
    base, embed = naming.base, naming.stored(EMBED)
    inside = {embed.removeprefix(base), naming.stored("model.norm.weight").removeprefix(base)}
    if inside & infos.keys() and not any(key.startswith(base) for key in infos):
        # The base class saved it, which has no such attribute.
        for key in [key for key in infos if not key.startswith("lm_head.")]:
            infos[f"{base}{key}"] = infos.pop(key)
    if is_head_tied and HEAD in infos and embed not in infos:
        infos[embed] = infos.pop(HEAD)


def _take_text_model(checkpoint: Checkpoint) -> None:
    """Of a multimodal model that says so, its text model's tensors alone."""
    infos, file = checkpoint.infos, checkpoint.directory / "config.json"
    found = next((p for p in WRAPPERS if any(key.startswith(p) for key in infos)), None)
    if found is None or not file.is_file() or "text_config" not in read_json(file):
        return
    kept = {
        key.replace(found, WRAPPERS[found], 1): info
        for key, info in infos.items()
        if key.startswith((found, "lm_head."))
    }
    infos.clear()
    infos.update(kept)


class StandardCheckpoint(Checkpoint):
    """A checkpoint under our names; tensors that are none of the model's keep their own.

    Args:
        checkpoint: under the family's full names.
        stored: what the model's tensors are there; those that are missing are left out.
        scale_suffix: what the key of a matrix' scale has behind the matrix' key; None: there are
            none.
    """

    def __init__(
        self, checkpoint: Checkpoint, stored: list[StoredTensor], scale_suffix: str | None
    ) -> None:
        self.directory, self._inner = checkpoint.directory, checkpoint
        self._views: dict[str, tuple[str, View | None]] = {}
        self.infos = dict(checkpoint.infos)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        found = [one for one in stored if one.key in checkpoint.infos]
        for one in found:
            del self.infos[one.key]
        for one in found:
            info = checkpoint.infos[one.key]
            for key, view in one.parts.items():
                is_whole = len(one.parts) == 1 and not view.is_transposed
                self._name(key, one.key, None if is_whole else view, info)
            scale_key = f"{one.key}{scale_suffix}"
            if scale_suffix and scale_key in checkpoint.infos:
                scale = checkpoint.infos[scale_key]
                is_one = scale.shape in ((), (1,))
                self.infos.pop(scale_key, None)
                for key, view in one.parts.items():
                    self._name(f"{key}{scale_suffix}", scale_key, None if is_one else view, scale)

    def _name(self, key: str, stored_key: str, view: View | None, info: TensorInfo) -> None:
        if view is not None:
            width = info.shape[:1] if view.is_transposed else info.shape[1:]
            info = info._replace(shape=(view.num_blocks * view.num_rows, *width))
        self._views[key] = (stored_key, view)
        self.infos[key] = info

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor as stored, mapped where that is a part of the file: use it before
        ``release``."""
        stored_key, view = self._views.get(key, (key, None))
        if view is None:
            return self._inner.tensor(stored_key)
        self._scratch = torch.empty(0, dtype=torch.uint8)  # what was read before stays
        whole = self.rows(key, 0, self.infos[key].shape[0])
        self._scratch = torch.empty(0, dtype=torch.uint8)
        return whole

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of :meth:`tensor`, which stay until others are read; of blocks their bytes."""
        stored_key, view = self._views.get(key, (key, None))
        if view is None:
            return self._inner.rows(stored_key, start, stop)
        if view.is_transposed:
            columns = slice(view.first + start, view.first + stop)
            turned = self._inner.tensor(stored_key)[:, columns].t()
            return self._room(turned.shape, turned.dtype).copy_(turned)
        size, block = view.num_rows, self._inner.infos[stored_key].shape[0] // view.num_blocks
        begin, end = start // size, -(-stop // size)
        stored = self._inner.rows(
            stored_key, begin * block + view.first, (end - 1) * block + view.first + size
        )
        if end - begin == 1:
            return stored[start - begin * size : stop - begin * size]
        places = torch.arange(start, stop)
        places = (places // size - begin) * block + places % size
        room = self._room((len(places), *stored.shape[1:]), stored.dtype)
        return torch.index_select(stored, 0, places, out=room)

    def _room(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a copy, the same each time: pieces in memory of their own would leave holes
        between what stays, and a model's load would need half as much again."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if len(self._scratch) < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
        return self._scratch[:num_bytes].view(dtype).view(*shape)

    def reads_all(self, key: str) -> bool:
        """Whether some rows of a tensor touch all pages of what is stored."""
        _, view = self._views.get(key, (key, None))
        return view is not None and view.is_transposed

    def release(self) -> None:
        """Unmap what was read."""
        self._inner.release()


def float8_scale(checkpoint: Checkpoint, key: str) -> torch.Tensor:
    """``[1, 1]`` or ``[rows, 1]`` float32: the factors of a float8 matrix.

    Args:
        checkpoint: under our names.
        key: of the scale.

    Raises:
        CheckpointError: a factor is no power of two.
    """
    scale = checkpoint.tensor(key).to(torch.float32).reshape(-1, 1)
    mantissa, _ = torch.frexp(scale)
    # Only powers of two keep the dequantised weight exact in bfloat16.
    if not bool((mantissa == 0.5).all() and torch.isfinite(scale).all()):
        info = checkpoint.infos[key]
        raise CheckpointError(f"{info.file}: {info.key}: expected positive powers of two")
    return scale
