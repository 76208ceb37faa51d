"""What ``quantization_config`` says of a checkpoint's matrices: formats that load, and all others.

Only how weights are stored is taken up. They are computed with as their dequantised values; what a
format would do to activations or to keys and values is not done, and said (:attr:`notes`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrt.config.directory import read_json
from specrt.types import CheckpointError

_SUPPORTED = "AWQ (gemm), GPTQ, compressed-tensors (int and float8) and float8 (fp8, fbgemm_fp8)"
_WEIGHT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_GPTQ_BITS = (2, 3, 4, 8)
# Other names of formats, where the usual one tells more.
_NAMES = {"mxfp4": "MXFP4", "hqq": "HQQ", "eetq": "EETQ", "aqlm": "AQLM"}


@dataclass(frozen=True)
class Scheme:
    """How some of a checkpoint's matrices are stored."""

    layout: str
    """``awq``, ``gptq``, ``packed`` (words of compressed-tensors) or ``scaled`` (numbers)."""
    bits: int
    group_size: int | None = None
    """Columns of a scale; None: as many as the matrix has, or a block's."""
    block: tuple[int, int] | None = None
    """Rows and columns of a scale."""
    is_symmetric: bool = False
    """Of ``packed`` and ``scaled``: whether there is no zero point."""
    has_offset: bool = False
    """Of ``gptq``: whether zero points are stored less one, as in its first version."""
    is_rounded_once: bool = False
    """Of ``scaled``: products are float32; else of the scales' dtype."""
    targets: tuple[str, ...] = ("Linear",)
    """Modules that are stored so, as compressed-tensors names them."""

    def is_of(self, module: str) -> int:
        """How narrowly a target names a module: 0, it is not of this scheme; 1, by its class."""
        found = 0
        for target in self.targets:
            if target == module:
                return 3
            if target.startswith("re:"):
                found = max(found, 2 * bool(re.match(target.removeprefix("re:"), module)))
            elif target in ("Linear", "Embedding"):
                found = max(found, 1)
        return found


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's matrices are stored."""

    name: str
    """Of the format, for messages."""
    schemes: tuple[Scheme, ...]
    notes: tuple[str, ...] = ()
    """What of it is not done."""

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme that names a module most narrowly; None: none does."""
        best = max(self.schemes, key=lambda scheme: scheme.is_of(module))
        return best if best.is_of(module) else None

    @property
    def notice(self) -> str:
        """One line for the log."""
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.name} weights are computed with as their dequantised values{notes}"


def stored_quantization(directory: Path) -> Quantization | None:
    """What a directory's ``config.json`` says; None: there is none, or it says nothing.

    Raises:
        CheckpointError: as :func:`read_quantization`, or the file cannot be read.
    """
    file = directory / "config.json"
    return read_quantization(read_json(file), str(file)) if file.is_file() else None


def read_quantization(data: Mapping[str, Any], source: str) -> Quantization | None:
    """Read it, of a model or of the wrapper around a text model.

    Args:
        data: the content of a ``config.json``.
        source: what errors call it.

    Raises:
        CheckpointError: a format that does not load (named), or a malformed one.
    """
    inner = data.get("text_config")
    for place in (data, inner if isinstance(inner, Mapping) else {}):
        if place.get("quantization") is not None:
            raise _refused(source, "quantization", "MLX")
        for key in ("quantization_config", "compression_config"):
            said = place.get(key)
            if said is None:
                continue
            if not isinstance(said, Mapping):
                raise CheckpointError(f"{source}: {key}: expected an object, got {said!r}")
            usual = "compressed-tensors" if key == "compression_config" else "unnamed"
            return _Reader(said, key, source).read(str(said.get("quant_method") or usual))
    return None


def _refused(source: str, key: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: {key}: weights stored as {name} do not load (what loads: {_SUPPORTED}); take "
        "the unquantised model"
    )


class _Reader:
    """One ``quantization_config``."""

    def __init__(self, said: Mapping[str, Any], key: str, source: str) -> None:
        self._said, self._key, self._source = said, key, source

    def read(self, method: str) -> Quantization:
        read = {
            "awq": self._awq,
            "gptq": self._gptq,
            "compressed-tensors": self._compressed,
            "fp8": self._fp8,
            "fbgemm_fp8": self._fbgemm,
        }.get(method.lower())
        if read is None:
            raise self._fail_format(_NAMES.get(method, method))
        return read()

    def _awq(self) -> Quantization:
        said = self._said
        version = said.get("version") or said.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise self._fail_format(f"AWQ of version {version}")
        if not said.get("zero_point", True):
            raise self._fail_format("AWQ without zero points")
        bits = self._bits(said, "bits", "w_bit", allowed=(4,))
        return Quantization("AWQ", (Scheme("awq", bits, self._group_size("group_size")),))

    def _gptq(self) -> Quantization:
        said = self._said
        version = str(said.get("checkpoint_format") or said.get("format") or "gptq").lower()
        if version not in ("gptq", "gptq_v2") or said.get("is_marlin_format"):
            raise self._fail_format(f"GPTQ of format {version if version != 'gptq' else 'marlin'}")
        if said.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise self._fail_format(f"GPTQ packed in {said['pack_dtype']}")
        for name in ("adapter", "rotation"):
            if said.get(name):
                raise self._fail_format(f"GPTQ with {name} {said[name]!r}")
        dynamic = said.get("dynamic") or {}
        if any(not str(pattern).startswith("-:") for pattern in dynamic):
            raise self._fail_format("GPTQ with settings of its own for some modules (dynamic)")
        bits = self._bits(said, "bits", allowed=_GPTQ_BITS)
        scheme = Scheme("gptq", bits, self._group_size("group_size"), has_offset=version == "gptq")
        return Quantization("GPTQ", (scheme,))

    def _fp8(self) -> Quantization:
        said = self._said
        if said.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise self._fail_format(f"float8 in {said['fmt']}")
        block = self._pair(said, "weight_block_size")
        notes = (_activations("float8"),)
        scheme = Scheme("scaled", 8, None, block, is_symmetric=True, is_rounded_once=True)
        return Quantization("float8", (scheme,), notes)

    def _fbgemm(self) -> Quantization:
        scheme = Scheme("scaled", 8, is_symmetric=True, is_rounded_once=True)
        return Quantization("float8 (fbgemm)", (scheme,), (_activations("float8"),))

    def _compressed(self) -> Quantization:
        said = self._said
        sparsity = said.get("sparsity_config") or {}
        if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
            raise self._fail_format(f"compressed-tensors with sparsity ({sparsity['format']})")
        for name in ("transform_config", "moe_sparsity_config"):
            inner = said.get(name)
            if inner and (not isinstance(inner, Mapping) or inner.get("config_groups", inner)):
                raise self._fail_format(f"compressed-tensors with {name}")
        groups = said.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise self._fail("config_groups: expected some, got none")
        schemes = tuple(self._group(name, group) for name, group in groups.items())
        notes: list[str] = []
        for inputs in (group.get("input_activations") for group in groups.values()):
            if inputs and not notes:
                notes.append(_activations(f"{inputs.get('num_bits', 8)} bits"))
        if said.get("kv_cache_scheme"):
            notes.append("keys and values are not quantised (kv_cache_scheme)")
        return Quantization("compressed-tensors", schemes, tuple(notes))

    def _group(self, name: str, group: Any) -> Scheme:
        """One of compressed-tensors' groups of modules."""
        if not isinstance(group, Mapping):
            raise self._fail_format(f"compressed-tensors by the preset {name}")
        form = str(group.get("format") or self._said.get("format") or "")
        weights = group.get("weights")
        if form not in _WEIGHT_FORMATS or not isinstance(weights, Mapping):
            raise self._fail_format(f"compressed-tensors in format {form or 'unnamed'}")
        kind, strategy = weights.get("type", "int"), weights.get("strategy") or "tensor"
        is_packed = form == "pack-quantized"
        if kind not in ("int", "float") or (is_packed and kind != "int"):
            raise self._fail_format(f"compressed-tensors in format {form} of type {kind}")
        known = ("tensor", "channel", "group", "block")
        if strategy not in known[1:3] and (is_packed or strategy not in known):
            raise self._fail_format(f"compressed-tensors in format {form}, scaled by {strategy}")
        targets = group.get("targets") or ["Linear"]
        return Scheme(
            "packed" if is_packed else "scaled",
            self._bits(weights, "num_bits", allowed=tuple(range(2, 9)) if is_packed else (8,)),
            self._size(weights, "group_size") if strategy == "group" else None,
            self._pair(weights, "block_structure", _REQUIRED) if strategy == "block" else None,
            is_symmetric=bool(weights.get("symmetric", True)),
            targets=tuple(map(str, targets)),
        )

    def _bits(self, place: Mapping[str, Any], *keys: str, allowed: tuple[int, ...]) -> int:
        bits = next((place[key] for key in keys if key in place), None)
        if bits not in allowed or isinstance(bits, bool):
            raise self._fail(f"{keys[0]}: expected {' or '.join(map(str, allowed))}, got {bits!r}")
        return int(bits)

    def _group_size(self, key: str) -> int | None:
        """Columns; None for -1, which means all."""
        return None if self._said.get(key) == -1 else self._size(self._said, key)

    def _size(self, place: Mapping[str, Any], key: str) -> int:
        value = place.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._fail(f"{key}: expected a number of columns, got {value!r}")
        return value

    def _pair(
        self, place: Mapping[str, Any], key: str, default: object = None
    ) -> tuple[int, int] | None:
        value = place.get(key, default)
        if value is None:
            return None
        is_pair = isinstance(value, (list, tuple)) and len(value) == 2
        if not is_pair or not all(type(one) is int and one > 0 for one in value):
            raise self._fail(f"{key}: expected rows and columns of a block, got {value!r}")
        return value[0], value[1]

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._source}: {self._key}.{message}")

    def _fail_format(self, name: str) -> CheckpointError:
        return _refused(self._source, self._key, name)


_REQUIRED = object()


def _activations(what: str) -> str:
    return f"activations are not rounded to {what}"
