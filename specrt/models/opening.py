"""From a path to the tensors there, whatever they are stored as."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import torch

from specrt.config.directory import gguf_path
from specrt.config.gguf_header import BLOCK_SIZES
from specrt.config.quantization import stored_quantization
from specrt.models.adapted import AdaptedCheckpoint
from specrt.models.checkpoint import Checkpoint
from specrt.models.gguf_checkpoint import GgufCheckpoint
from specrt.models.gguf_file import GgufFile
from specrt.models.layouts import dtype_name
from specrt.models.quantized.checkpoint import QuantizedCheckpoint
from specrt.ops import MatrixKind


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
