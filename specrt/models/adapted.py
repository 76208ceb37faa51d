"""A checkpoint with a LoRA adapter merged into its matrices as they are read.

W is ``[N, K]``, A ``[R, K]``, B ``[N, R]``: what is read is ``W + scaling * B A`` in float32, which
is rounded once, to what it is loaded as; so peft merges in a model's dtype. DoRA scales each row of
that to a length of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from specrt.config.lora import read_adapter_config
from specrt.models.checkpoint import Checkpoint, TensorInfo
from specrt.models.families import HEAD
from specrt.models.layouts import dtype_name
from specrt.types import CheckpointError

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PRODUCT, _TABLE = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
# After the module's name: the part, the adapter's name where it was saved with it, what it is.
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(embedding_)?[AB]|lora_magnitude_vector)(\.default)?"
    r"(\.weight)?"
)
_WHOLE = re.compile(r"(?P<module>.+?)(\.(modules_to_save(\.default)?|base_layer))?\.weight")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte)$")


@dataclass(frozen=True)
class _Change:
    """What an adapter has for one matrix."""

    module: str
    """As the adapter calls it."""
    parts: dict[str, str] = field(default_factory=dict)
    """Keys of the adapter's file, by part; ``weight`` replaces the matrix."""


class AdaptedCheckpoint(Checkpoint):
    """The tensors of a checkpoint, those that an adapter is of with its products added.

    Args:
        base: the model's checkpoint, not in blocks.
        directory: with peft's ``adapter_config.json`` and its tensors.

    Raises:
        CheckpointError: the adapter is broken, not of this model, or not one that can be merged.
    """

    def __init__(self, base: Checkpoint, directory: Path) -> None:
        self.directory, self._base = base.directory, base
        self._config = read_adapter_config(directory)
        self._adapter = Checkpoint(directory, ADAPTER_FILES)
        self.infos, self.idle = dict(base.infos), base.idle
        self.is_quantized = base.is_quantized
        self._keys = {(info.file, info.key): key for key, info in base.infos.items()}
        self._changes: dict[str, _Change] = {}
        for key in self._adapter.infos:
            self._take(key)
        for key, change in self._changes.items():
            self._check(key, change)
            self.infos[key] = self.infos[key]._replace(dtype=torch.float32)

    def tensor(self, key: str) -> torch.Tensor:
        """As stored, or merged."""
        return self.rows(key, 0, self.infos[key].shape[0])

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of it; float32 where they are merged."""
        info = self.infos[key]
        own = self._keys[info.file, info.key]
        change = self._changes.get(own)
        if change is None:
            return self._base.rows(own, start, stop)
        if "weight" in change.parts:
            rows = self._adapter.rows(change.parts["weight"], start, stop).float()
        else:
            rows = self._base.rows(own, start, stop).float()
        return self._merged(own, change, rows, start, stop)

    def release(self) -> None:
        """Unmap what was read."""
        self._base.release()
        self._adapter.release()

    def _merged(
        self, key: str, change: _Change, rows: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        names = next((pair for pair in (_PRODUCT, _TABLE) if pair[0] in change.parts), None)
        if names is None:
            return rows
        down, up = (self._part(change, name) for name in names)
        if names is _TABLE or self._is_transposed(key, change):
            product = (up @ down[:, start:stop]).T
        else:
            product = up[start:stop] @ down
        merged = rows + product * self._config.scaling_of(change.module)
        if _MAGNITUDE in change.parts:
            lengths = torch.linalg.norm(merged, dim=1)
            merged *= (self._part(change, _MAGNITUDE)[start:stop] / lengths)[:, None]
        return merged

    def _part(self, change: _Change, name: str) -> torch.Tensor:
        return self._adapter.tensor(change.parts[name]).float()

    def _is_transposed(self, key: str, change: _Change) -> bool:
        """Whether the model's matrix is ``[K, N]``: its shape tells, or else the adapter."""
        down, up = (self._adapter.infos[change.parts[name]].shape for name in _PRODUCT)
        num_rows, num_columns = up[0], down[1]
        if num_rows == num_columns:
            return self._config.is_transposed
        return self._base.infos[key].shape == (num_columns, num_rows)

    # --- what an adapter's file has -----------------------------------------------------------

    def _take(self, key: str) -> None:
        """Find the matrix that a tensor of the adapter is of."""
        name = key.removeprefix("base_model.model.")
        found = _PART.fullmatch(name) or _WHOLE.fullmatch(name)
        if found is None:
            raise self._fault(key, "not supported (a bias, or a part of another kind of adapter)")
        module = found["module"]
        matrix = self._matrix_of(module)
        if matrix is None:
            of = f", it was made for {self._config.base}" if self._config.base else ""
            raise self._fault(key, f"the model has no {module}.weight{of}")
        if _EMBEDDING.search(module) and HEAD not in self._base.infos:
            raise self._fault(key, "changes an embedding that is the head too, which is ambiguous")
        change = self._changes.setdefault(matrix, _Change(module))
        change.parts[found.groupdict().get("part") or "weight"] = key

    def _matrix_of(self, module: str) -> str | None:
        """The key of a module's matrix, which a base class has saved without ``model.``."""
        names = (f"{module}.weight", f"{module.removeprefix('model.')}.weight")
        return next((name for name in names if name in self._base.infos), None)

    def _check(self, key: str, change: _Change) -> None:
        info = self._base.infos[key]
        if info.dtype not in (*_FLOATS, torch.float64):
            raise CheckpointError(
                f"{info.file}: {info.key}: an adapter is merged into rows of floats, got "
                f"{dtype_name(info.dtype)} (take the model that is not in blocks)"
            )
        expected_parts = self._expected(info, change)
        for name in change.parts.keys() - expected_parts.keys():
            raise self._fault(change.parts[name], "not expected (adapter_config.json)")
        for name, shapes in expected_parts.items():
            part = self._adapter.infos.get(change.parts.get(name, ""))
            if part is None:
                given = next(iter(change.parts.values()))
                raise self._fault(given, f"expected {change.module}.{name} beside it, found none")
            if part.shape not in shapes or part.dtype not in _FLOATS:
                expected = " or ".join(str(list(shape)) for shape in shapes)
                made = f"; the adapter was made for {self._config.base}" * bool(self._config.base)
                raise self._fault(
                    part.key,
                    f"expected {expected} for {info.key} {list(info.shape)}, got "
                    f"{list(part.shape)} {dtype_name(part.dtype)}{made}",
                )

    def _expected(
        self, info: TensorInfo, change: _Change
    ) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        """The shapes that the parts of a change may have."""
        if len(info.shape) != 2:
            return {"weight": (info.shape,)}
        (num_rows, num_columns), rank = info.shape, self._config.rank_of(change.module)
        shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
        if "weight" in change.parts:
            shapes["weight"] = (info.shape,)
        if set(_TABLE) & set(change.parts):
            shapes |= {_TABLE[0]: ((rank, num_rows),), _TABLE[1]: ((num_columns, rank),)}
        if set(_PRODUCT) & set(change.parts):
            down = self._adapter.infos.get(change.parts.get(_PRODUCT[0], ""))
            is_turned = down is not None and down.shape == (rank, num_rows)
            is_turned &= num_rows != num_columns
            sizes = (num_columns, num_rows) if is_turned else (num_rows, num_columns)
            shapes |= {_PRODUCT[0]: ((rank, sizes[1]),), _PRODUCT[1]: ((sizes[0], rank),)}
            if self._config.has_magnitudes and not is_turned and not self._config.is_transposed:
                shapes[_MAGNITUDE] = ((num_rows,),)
        return shapes

    def _fault(self, key: str, message: str) -> CheckpointError:
        return CheckpointError(f"{self._adapter.infos[key].file}: {key}: {message}")
