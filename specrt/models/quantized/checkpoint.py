"""A checkpoint whose quantised matrices are read as plain ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specrt.config.quantization import Quantization
from specrt.models.checkpoint import Checkpoint, TensorInfo
from specrt.models.quantized.integers import AwqMatrix, GptqMatrix, PackQuantizedMatrix
from specrt.models.quantized.parts import Parts, StoredMatrix
from specrt.models.quantized.scaled import NUMBERS, ScaledMatrix
from specrt.types import CheckpointError

_LAYOUTS: Mapping[str, type[StoredMatrix]] = {
    "awq": AwqMatrix,
    "gptq": GptqMatrix,
    "packed": PackQuantizedMatrix,
    "scaled": ScaledMatrix,
}
# Of activations, which are not quantised here.
_IDLE = (
    "input_scale",
    "input_zero_point",
    "input_scale_ub",
    "input_g_idx",
    "output_scale",
    "output_zero_point",
    "activation_scale",
)


class QuantizedCheckpoint(Checkpoint):
    """The tensors of a checkpoint, quantised matrices as the values they stand for.

    Tensors that belong together are one, under the name of the plain weight. What is not quantised
    stays as it is.

    Args:
        stored: the checkpoint as its files have it.
        quantization: how its matrices are stored.

    Raises:
        CheckpointError: nothing in it is quantised, or a matrix is of another format, lacks a part
            or has one of a wrong shape or dtype.
    """

    is_quantized = True

    def __init__(self, stored: Checkpoint, quantization: Quantization) -> None:
        self.directory = stored.directory
        self._stored, self._name = stored, quantization.name
        self._matrices: dict[tuple[object, str], StoredMatrix] = {}
        self.infos = dict(stored.infos)
        for key, info in stored.infos.items():
            layout = _layout_of(key, info)
            if layout is not None:
                self._take(key, layout, quantization)
        if not self._matrices:
            raise CheckpointError(
                f"{self.directory}: expected {self._name} tensors (config.json), found none"
            )
        self.idle = frozenset(filter(self._is_empty_bias, self.infos))
        stored.release()
        modules = {matrix.parts.module for matrix in self._matrices.values()}
        for key in stored.infos:
            module, _, end = key.rpartition(".")
            if module in modules and end in _IDLE:
                del self.infos[key]

    def tensor(self, key: str) -> torch.Tensor:
        """As stored, or the values of a quantised matrix."""
        return self.rows(key, 0, self.infos[key].shape[0])

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of it."""
        info = self.infos[key]
        matrix = self._matrices.get((info.file, info.key))
        if matrix is not None:
            return matrix.rows(start, stop)
        return self._stored.rows(info.key, start, stop)

    def release(self) -> None:
        """Unmap what was read."""
        self._stored.release()

    def _is_empty_bias(self, key: str) -> bool:
        """Whether it is one of the zeros that AutoGPTQ gave every matrix, asked for or not."""
        module, _, end = key.rpartition(".")
        matrix = self.infos.get(f"{module}.weight")
        is_of_one = matrix is not None and (matrix.file, matrix.key) in self._matrices
        return end == "bias" and is_of_one and not bool(self._stored.tensor(key).any())

    def _take(self, key: str, layout: str, quantization: Quantization) -> None:
        """Put a matrix in the place of its tensors."""
        module = key.rpartition(".")[0]
        scheme = quantization.scheme_of(module)
        names = [layout] if layout != "qweight" else ["awq", "gptq"]
        if scheme is None or scheme.layout not in names:
            raise CheckpointError(
                f"{self.infos[key].file}: {key}: expected {self._name} (config.json), got a tensor "
                "of another format"
            )
        matrix = _LAYOUTS[scheme.layout](Parts(self._stored, module), scheme)
        for end in (matrix.main, *matrix.others):
            self.infos.pop(f"{module}.{end}", None)
        self.infos[f"{module}.weight"] = info = matrix.info
        self._matrices[info.file, info.key] = matrix


def has_codes(stored: Checkpoint) -> bool:
    """Whether a checkpoint has matrices that names and dtypes tell to be quantised."""
    return any(_layout_of(key, info) is not None for key, info in stored.infos.items())


def _layout_of(key: str, info: TensorInfo) -> str | None:
    """What a tensor's name and dtype say it holds the codes of; None: it is none such."""
    end = key.rpartition(".")[2]
    if end == "qweight":
        return end
    if end == "weight_packed":
        return "packed"
    return "scaled" if end == "weight" and info.dtype in NUMBERS else None
