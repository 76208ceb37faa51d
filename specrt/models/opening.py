"""From a path to the tensors there, whatever they are stored as."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from specrt.config.directory import gguf_path
from specrt.config.gguf_header import BLOCK_SIZES
from specrt.config.lora import read_adapter_config
from specrt.config.quantization import stored_quantization
from specrt.models.adapted import ADAPTER_FILES, AdaptedCheckpoint
from specrt.models.checkpoint import Checkpoint
from specrt.models.gguf_checkpoint import GgufCheckpoint
from specrt.models.gguf_file import GgufFile
from specrt.models.layouts import dtype_name
from specrt.models.quantized.checkpoint import QuantizedCheckpoint
from specrt.ops import MatrixKind

_PROBE, _NUM_PROBES = 1 << 16, 16  # bytes, of a file whose content is to be told


def open_checkpoint(
    path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """A directory's files, quantised matrices as their values, or a GGUF file.

    Args:
        path: of the directory or the file.
        adapter: a directory with a LoRA adapter, whose products are added to its matrices.

    Raises:
        CheckpointError: as of :class:`~specrt.models.checkpoint.Checkpoint`,
            :class:`~specrt.models.gguf_file.GgufFile`,
            :class:`~specrt.models.quantized.checkpoint.QuantizedCheckpoint` and
            :class:`~specrt.models.adapted.AdaptedCheckpoint`.
    """
    checkpoint = _stored(path)
    if not isinstance(checkpoint, GgufCheckpoint):
        quantization = stored_quantization(checkpoint.directory)
        if quantization is not None:
            checkpoint = QuantizedCheckpoint(checkpoint, quantization)
    return checkpoint if adapter is None else AdaptedCheckpoint(checkpoint, Path(adapter))


def _stored(path: str | os.PathLike[str]) -> Checkpoint:
    file = gguf_path(path)
    return Checkpoint(path) if file is None else GgufCheckpoint(GgufFile(file))


def stored_bytes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Bytes of a checkpoint's tensors by dtype or kind of blocks, the most first; none is read.

    Raises:
        CheckpointError: as :func:`open_checkpoint`.
    """
    sizes: Counter[str] = Counter()
    for info in _stored(path).infos.values():
        count = math.prod(info.shape)
        if isinstance(info.dtype, MatrixKind):
            block = BLOCK_SIZES[info.dtype.name]
            sizes[info.dtype.name] += count // block.values * block.bytes
        elif isinstance(info.dtype, torch.dtype):
            sizes[dtype_name(info.dtype)] += count * info.dtype.itemsize
    return dict(sizes.most_common())


def weights_hash(
    path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None
) -> str:
    """Sixteen hex digits of the weight files' names, sizes, headers and samples of their content.

    Reading all of a large target would take minutes; two fine-tunings of one model differ in
    nearly every byte.

    Args:
        path: of a model: a directory, or a GGUF file.
        adapter: a directory with a LoRA adapter that is merged into it.

    Raises:
        CheckpointError: no weights, or no adapter.
    """
    gguf = gguf_path(path)
    files = [gguf] if gguf else sorted({info.file for info in Checkpoint(path).infos.values()})
    digest = _digest(files)
    if (merged := adapter_hash(adapter)) is not None:
        digest.update(merged.encode())
    return digest.hexdigest()[:16]


def adapter_hash(adapter: str | os.PathLike[str] | None) -> str | None:
    """The same of a LoRA adapter's tensors and settings; None of None.

    Raises:
        CheckpointError: the directory holds no adapter.
    """
    if adapter is None:
        return None
    said = vars(read_adapter_config(adapter))
    settings = {name: value for name, value in said.items() if name not in ("file", "base")}
    infos = Checkpoint(adapter, ADAPTER_FILES).infos
    digest = _digest(sorted({info.file for info in infos.values()}))
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _digest(files: Iterable[Path]) -> hashlib._Hash:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for probe in range(_NUM_PROBES):
                stream.seek(size * probe // _NUM_PROBES)
                digest.update(stream.read(_PROBE))
    return digest
