"""A GGUF file, loaded as a checkpoint directory is."""

from __future__ import annotations

import torch

from specrt.models.checkpoint import Checkpoint, TensorInfo
from specrt.models.gguf_file import GgufFile
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
