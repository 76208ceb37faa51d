"""A GGUF file, loaded as a checkpoint directory is."""

from __future__ import annotations

import math
import os
from collections import Counter

import torch

from specrt.config.directory import gguf_path
from specrt.config.gguf_header import BLOCK_SIZES
from specrt.models.checkpoint import Checkpoint, TensorInfo
from specrt.models.gguf_file import GgufFile
from specrt.models.layouts import dtype_name
from specrt.ops import MatrixKind


class GgufCheckpoint(Checkpoint):
    """The tensors of a file under Hugging Face's names.

    Args:
        file: the file.
    """

    def __init__(self, file: GgufFile) -> None:
        self.directory, self._gguf = file.path, file
        self.infos = {
            key: TensorInfo(
                file.path, tensor.name, tensor.shape, tensor.dtype or MatrixKind[tensor.kind]
            )
            for key, tensor in file.tensors.items()
        }

    def tensor(self, key: str) -> torch.Tensor:
        """As stored, in Hugging Face's order of rows, mapped where that is the file's."""
        return self.rows(key, 0, self.infos[key].shape[0])

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Some rows; of blocks their bytes."""
        tensor = self._gguf.tensors[key]
        return (tensor.rows if tensor.dtype is None else tensor.values)(start, stop)

    def release(self) -> None:
        """Give up the pages that were read."""
        self._gguf.release()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A directory's files, or a GGUF file.

    Raises:
        CheckpointError: as of :class:`~specrt.models.checkpoint.Checkpoint` and
            :class:`~specrt.models.gguf_file.GgufFile`.
    """
    file = gguf_path(path)
    return Checkpoint(path) if file is None else GgufCheckpoint(GgufFile(file))


def stored_bytes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Bytes of a checkpoint's tensors by dtype or kind of blocks, the most first; none is read.

    Raises:
        CheckpointError: as :func:`open_checkpoint`.
    """
    sizes: Counter[str] = Counter()
    for info in open_checkpoint(path).infos.values():
        count = math.prod(info.shape)
        if isinstance(info.dtype, MatrixKind):
            block = BLOCK_SIZES[info.dtype.name]
            sizes[info.dtype.name] += count // block.values * block.bytes
        elif isinstance(info.dtype, torch.dtype):
            sizes[dtype_name(info.dtype)] += count * info.dtype.itemsize
    return dict(sizes.most_common())
