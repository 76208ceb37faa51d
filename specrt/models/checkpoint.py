"""The weight files of a Hugging Face directory, as one mapping from key to tensor.

Files are memory-mapped, and mappings are dropped on ``release``, so that reading a checkpoint of
any size keeps only the tensors in hand resident.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from specrt.config import check_file, checkpoint_directory, foreign_files, read_json
from specrt.ops import MatrixKind
from specrt.types import CheckpointError

# In transformers' order of preference.
_FILES = ("model.safetensors", "pytorch_model.bin")

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """Where a tensor is and what it is, known without reading it."""

    file: Path
    key: str
    """What the file calls it."""
    shape: tuple[int, ...]
    dtype: torch.dtype | MatrixKind | str
    """The dtype; of a GGUF file's blocks their kind; a name in the file where neither is one."""


class _File(Protocol):
    """One opened weight file."""

    def infos(self) -> Iterator[tuple[str, TensorInfo]]: ...

    def tensor(self, key: str) -> torch.Tensor: ...

    def release(self) -> None: ...


class Checkpoint:
    """The tensors of a checkpoint directory, read one at a time.

    ``infos`` holds every tensor by its key; whoever knows the layout may give it another one.

    Args:
        path: the directory.
        names: of the files to look for, the first that is there, each whole or in shards.

    Raises:
        CheckpointError: no directory, no weights, or a file that is missing, truncated or corrupt.
    """

    idle: frozenset[str] = frozenset()
    """Keys of tensors that add nothing, and may stay unread."""
    is_quantized = False
    """Whether its configuration tells how matrices are stored, and they are read so."""

    def __init__(self, path: str | os.PathLike[str], names: Sequence[str] = _FILES) -> None:
        self.directory = checkpoint_directory(path)
        self._files: dict[Path, _File] = {}
        self.infos: dict[str, TensorInfo] = {}
        candidates = [name for file in names for name in (file, f"{file}.index.json")]
        found = [name for name in candidates if (self.directory / name).exists()]
        if not found:
            foreign = foreign_files(self.directory) if names is _FILES else None
            note = f": {foreign}" if foreign else f" (one of {', '.join(candidates)})"
            raise CheckpointError(f"{self.directory}: no weights{note}")
        if found[0].endswith(".json"):
            self._open_shards(self.directory / found[0])
        else:
            self._open(self.directory / found[0], {})

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor as stored, mapped from its file: use it before ``release``."""
        info = self.infos[key]
        return self._files[info.file].tensor(info.key)

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of :meth:`tensor`; of blocks their bytes, ``[stop - start, bytes of a row]``
        uint8."""
        return self.tensor(key)[start:stop]

    @property
    def has_blocks(self) -> bool:
        """Whether any tensor lies in blocks."""
        return any(isinstance(info.dtype, MatrixKind) for info in self.infos.values())

    def reads_all(self, key: str) -> bool:
        """Whether some rows of a tensor touch all pages of what is stored."""
        return False

    def release(self) -> None:
        """Unmap what was read; otherwise every page touched would stay resident."""
        for file in self._files.values():
            file.release()

    def _open_shards(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: no weight_map")
        present = os.listdir(self.directory)
        for name in sorted(set(map(str, weight_map.values()))):
            if name not in present:
                raise CheckpointError(f"{index}: names a shard that is missing: {name}")
            self._open(self.directory / name, weight_map)
        for key, name in weight_map.items():
            if key not in self.infos:
                raise CheckpointError(f"{self.directory / name}: missing tensor {key}")

    def _open(self, path: Path, weight_map: Mapping[str, Any]) -> None:
        """Take a file's tensors, but for those that ``weight_map`` gives to another file."""
        check_file(path)
        file: _File = (_SafetensorsFile if path.suffix == ".safetensors" else _TorchFile)(path)
        for key, info in file.infos():
            if weight_map.get(key, path.name) != path.name:
                continue
            if key in self.infos:
                raise CheckpointError(f"{path}: {key} is also in {self.infos[key].file.name}")
            self.infos[key] = info
        self._files[path] = file
        file.release()


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: Any = None

    def infos(self) -> Iterator[tuple[str, TensorInfo]]:
        handle = self._open()
        keys: list[str] = handle.keys()
        for key in keys:
            view = handle.get_slice(key)
            dtype = _SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype())
            yield key, TensorInfo(self._path, key, tuple(view.get_shape()), dtype)

    def tensor(self, key: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._open().get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self._path, error, key) from error
        return tensor

    def release(self) -> None:
        self._handle = None

    def _open(self) -> Any:
        if self._handle is None:
            try:
                self._handle = safe_open(self._path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _unreadable(self._path, error) from error
        return self._handle


class _TorchFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        # Files of before torch 1.6 are no zip archives and cannot be mapped.
        self._is_mapped = zipfile.is_zipfile(path)
        self._tensors: dict[str, torch.Tensor] | None = None

    def infos(self) -> Iterator[tuple[str, TensorInfo]]:
        for key, tensor in self._open().items():
            yield key, TensorInfo(self._path, key, tuple(tensor.shape), tensor.dtype)

    def tensor(self, key: str) -> torch.Tensor:
        return self._open()[key].detach()

    def release(self) -> None:
        if self._is_mapped:
            self._tensors = None

    def _open(self) -> dict[str, torch.Tensor]:
        if self._tensors is None:
            self._tensors = self._read()
        return self._tensors

    def _read(self) -> dict[str, torch.Tensor]:
        try:
            state = torch.load(
                self._path, map_location="cpu", mmap=self._is_mapped, weights_only=True
            )
        except Exception as error:  # a broken pickle makes its reader raise anything
            raise _unreadable(self._path, error) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{self._path}: no state dict but {type(state).__name__}")
        for key, value in state.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{self._path}: {key!r} is no tensor's name")
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(
                    f"{self._path}: {key} is no tensor but {type(value).__name__}"
                )
            kind = _strange_kind(value)
            if kind is not None:
                raise CheckpointError(f"{self._path}: {key}: expected a plain tensor, got {kind}")
        return state


def _strange_kind(tensor: torch.Tensor) -> str | None:
    """What a tensor is whose values do not lie in memory one by one."""
    kinds = {
        "a nested one": tensor.is_nested,
        "one without values (meta)": tensor.is_meta,
        "a quantised one": tensor.is_quantized,
        f"a sparse one ({tensor.layout})": tensor.layout != torch.strided,
    }
    return next((kind for kind, is_so in kinds.items() if is_so), None)


def _unreadable(path: Path, error: Exception, key: str | None = None) -> CheckpointError:
    """The reader's own complaint, cut to one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    place = f"{path}: {key}" if key else str(path)
    if isinstance(error, pickle.UnpicklingError):
        # torch's own first line tells how to run whatever is in there.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of {named[1]}" if named else "something"
        return CheckpointError(f"{place}: truncated or corrupt, or has {what} that is no tensor")
    return CheckpointError(f"{place}: truncated or corrupt: {lines[0]}")
