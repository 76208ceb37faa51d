"""The tensors that one quantised matrix is stored in, looked at before they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specrt.config.quantization import Scheme
from specrt.models.checkpoint import Checkpoint, TensorInfo
from specrt.models.layouts import dtype_name
from specrt.types import CheckpointError

SCALES = (torch.float16, torch.bfloat16, torch.float32)
"""What scales may be stored as."""


@dataclass(frozen=True)
class Parts:
    """The tensors of a module, by the ends of their names (``qweight``, ``weight_scale``)."""

    checkpoint: Checkpoint
    module: str
    """What comes before the dot."""

    def key(self, end: str) -> str:
        return f"{self.module}.{end}"

    def has(self, end: str) -> bool:
        return self.key(end) in self.checkpoint.infos

    def info(self, end: str, owner: str) -> TensorInfo:
        """Of a part that there must be, as there is ``owner``.

        Raises:
            CheckpointError: it is missing.
        """
        info = self.checkpoint.infos.get(self.key(end))
        if info is None:
            file = self.checkpoint.infos[self.key(owner)].file
            raise CheckpointError(
                f"{file}: missing tensor {self.key(end)}, which goes with {self.key(owner)}"
            )
        return info

    def tensor(self, end: str) -> torch.Tensor:
        return self.checkpoint.tensor(self.key(end))

    def check(
        self,
        end: str,
        owner: str,
        dtypes: Sequence[torch.dtype],
        *shapes: tuple[int, ...],
        why: str = "",
    ) -> torch.dtype:
        """The dtype of a part of one of some dtypes and shapes.

        Raises:
            CheckpointError: it is missing, or of others; ``why`` tells where the shapes are from.
        """
        info = self.info(end, owner)
        if info.dtype not in dtypes:
            expected = " or ".join(map(dtype_name, dtypes))
            raise self.fault(end, f"expected {expected}, got {dtype_name(info.dtype)}")
        if info.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise self.fault(end, f"expected {expected}{why}, got {list(info.shape)}")
        assert isinstance(info.dtype, torch.dtype), "one of them"
        return info.dtype

    def fault(self, end: str, message: str) -> CheckpointError:
        key = self.key(end)
        return CheckpointError(f"{self.checkpoint.infos[key].file}: {key}: {message}")


class StoredMatrix(ABC):
    """A matrix ``[N, K]`` that is read as values, some rows at a time.

    Args:
        parts: its tensors; their headers are checked.
        scheme: how they are stored.

    Raises:
        CheckpointError: a tensor is missing, or of a shape or dtype that the scheme does not have.
    """

    main: str
    """The end of the name of the tensor that holds the codes."""
    others: tuple[str, ...]
    """Ends of names of tensors that are no values of their own, where they are there."""
    shape: tuple[int, int]
    dtype: torch.dtype
    """Of the values."""

    def __init__(self, parts: Parts, scheme: Scheme) -> None:
        self.parts, self.scheme = parts, scheme

    @property
    def info(self) -> TensorInfo:
        """Of the values; the file and the name are those of the codes."""
        stored = self.parts.info(self.main, self.main)
        return stored._replace(shape=self.shape, dtype=self.dtype)

    @abstractmethod
    def rows(self, start: int, stop: int) -> torch.Tensor:
        """``[stop - start, K]`` of ``dtype``."""
