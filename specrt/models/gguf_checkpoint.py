"""A GGUF file of single values, loaded as a checkpoint directory is."""

from __future__ import annotations

import os

import torch

from specrt.config.directory import gguf_path
from specrt.models.checkpoint import Checkpoint, TensorInfo
from specrt.models.gguf_file import GgufFile
from specrt.types import CheckpointError


class GgufCheckpoint(Checkpoint):
    """The tensors of a file under Hugging Face's names.

    Args:
        file: whose tensors are F32, F16 or BF16.

    Raises:
        CheckpointError: a tensor lies in blocks.
    """

    def __init__(self, file: GgufFile) -> None:
        self.directory, self._gguf = file.path, file
        self.infos = {}
        for key, tensor in file.tensors.items():
            if tensor.dtype is None:
                raise CheckpointError(
                    f"{file.path}: {tensor.name}: expected F32, F16 or BF16, got {tensor.kind}: "
                    "products by weights in blocks are not built"
                )
            self.infos[key] = TensorInfo(file.path, tensor.name, tensor.shape, tensor.dtype)

    def tensor(self, key: str) -> torch.Tensor:
        """As stored, in Hugging Face's order of rows, mapped where that is the file's."""
        tensor = self._gguf.tensors[key]
        return tensor.values(0, tensor.shape[0])

    def release(self) -> None:
        """Give up the pages that were read."""
        self._gguf.release()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A directory's files, or a GGUF file.

    Raises:
        CheckpointError: as of :class:`~specrt.models.checkpoint.Checkpoint`,
            :class:`~specrt.models.gguf_file.GgufFile` and :class:`GgufCheckpoint`.
    """
    file = gguf_path(path)
    return Checkpoint(path) if file is None else GgufCheckpoint(GgufFile(file))
