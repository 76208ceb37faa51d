"""The two files of a drafter's checkpoint, of any kind: ``config.json`` and ``model.safetensors``.

Matrices are stored as values, or as bytes with a float32 scale a row, in compressed-tensors' format
``int-quantized``, which :mod:`specrt.models.quantized` reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from specrt.models.checkpoint import Checkpoint
from specrt.models.layouts import dtype_name
from specrt.types import CheckpointError

FORMAT_VERSION = 1
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Keys of ``config.json`` that tell how tensors are stored, which is written anew."""
STORED_AS = ("int8", "none")
"""What matrices can be stored as: bytes, or values of the drafter's dtype."""

_LARGEST = 127
_SCALE = ".weight_scale"
_BYTES: Mapping[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    },
    "ignore": ["calibration", "embed_tokens", "lm_head"],
}


def is_stored_as_bytes(data: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` says that :func:`write_files` stored matrices so."""
    return data.get("quantization_config") == _BYTES


def check_bytes(directory: Path, data: Mapping[str, Any]) -> None:
    """Refuse a damaged file of bytes by the tensor that is at fault; nothing else is looked at.

    Args:
        directory: the checkpoint's.
        data: the content of its ``config.json``.

    Raises:
        CheckpointError: bytes without their scale or a scale without its bytes, one of a wrong
            shape or dtype, or with values that are not positive and finite.
    """
    if not is_stored_as_bytes(data):
        return
    checkpoint = Checkpoint(directory)
    for key, info in checkpoint.infos.items():
        if key.endswith(_SCALE):
            _check_scale(checkpoint, key)
        elif info.dtype == torch.int8 and f"{key}_scale" not in checkpoint.infos:
            raise CheckpointError(
                f"{info.file}: missing tensor {key}_scale, which goes with {key} (int8)"
            )
    checkpoint.release()


def _check_scale(checkpoint: Checkpoint, key: str) -> None:
    info, owner = checkpoint.infos[key], key.removesuffix("_scale")
    codes = checkpoint.infos.get(owner)
    if codes is None:
        raise CheckpointError(f"{info.file}: missing tensor {owner}, which goes with {key}")
    place = f"{info.file}: {key}"
    if codes.dtype != torch.int8 or len(codes.shape) != 2:
        raise CheckpointError(
            f"{codes.file}: {owner}: expected int8 of two dimensions beside {key}, "
            f"got {dtype_name(codes.dtype)} {list(codes.shape)}"
        )
    if info.dtype != torch.float32 or info.shape != (codes.shape[0], 1):
        raise CheckpointError(
            f"{place}: expected float32 {[codes.shape[0], 1]}, a factor for each row of {owner}, "
            f"got {dtype_name(info.dtype)} {list(info.shape)}"
        )
    scale = checkpoint.tensor(key).flatten()
    bad = (~(scale.isfinite() & (scale > 0))).nonzero().flatten().tolist()
    if bad:
        raise CheckpointError(
            f"{place}: expected positive finite values, got {float(scale[bad[0]])} for row {bad[0]}"
        )


def write_files(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    as_bytes: Collection[str] = (),
) -> None:
    """Write both; they are whole before either takes its place.

    Args:
        path: the directory, made where it is missing.
        config: what ``config.json`` holds.
        tensors: what ``model.safetensors`` holds.
        shapes: of the tensors that must be there.
        as_bytes: keys of the matrices that are stored so (:func:`in_bytes`).

    Raises:
        ValueError: a tensor is missing or misshaped, or one that shall become bytes is not finite.
        OSError: the files cannot be written; those of before are left as they were.
    """
    for key, shape in shapes.items():
        if key not in tensors or tuple(tensors[key].shape) != shape:
            got = list(tensors[key].shape) if key in tensors else "nothing"
            raise ValueError(f"tensors[{key!r}]: expected {list(shape)}, got {got}")
    stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    if as_bytes:
        stored, config = in_bytes(stored, as_bytes), {**config, "quantization_config": _BYTES}
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    weights, said = directory / "model.safetensors", directory / "config.json"
    partial = {file: file.with_name(f"{file.name}.partial") for file in (weights, said)}
    try:
        save_file(stored, partial[weights], metadata={"format": "pt"})
        partial[weights].chmod(0o644)  # safetensors makes its files private
        partial[said].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in (weights, said):
            partial[file].replace(file)
    except SafetensorError as error:  # a full disk, among others
        raise OSError(f"{weights}: cannot be written: {error}") from error
    except OSError as error:  # which names no file where a write fails
        raise OSError(error.errno, error.strerror, error.filename or str(said)) from error
    finally:
        for file in partial.values():
            file.unlink(missing_ok=True)


def in_bytes(tensors: Mapping[str, torch.Tensor], keys: Collection[str]) -> dict[str, torch.Tensor]:
    """Matrices as signed bytes and a scale a row, all others as they are.

    Steps of a row are its largest magnitude / 127, and values are rounded to the nearest, ties to
    even, as :func:`specrt.ops.matrix_pack` has it: values that come of bytes become the same ones.

    Args:
        tensors: on the CPU.
        keys: ``"X.weight"`` ``[N, K]`` each, which becomes ``X.weight`` int8 and ``X.weight_scale``
            ``[N, 1]`` float32.

    Raises:
        ValueError: one of them has NaN or infinite values.
    """
    stored = dict(tensors)
    for key in keys:
        rows = tensors[key].float()
        largest = rows.abs().amax(1, keepdim=True)
        if not bool(largest.isfinite().all()):
            raise ValueError(f"tensors[{key!r}]: expected finite values, got others")
        least = torch.finfo(torch.float32).tiny
        steps = _LARGEST / largest.clamp(min=_LARGEST * least).double()
        stored[key] = (rows.double() * steps).round().to(torch.int8)
        stored[f"{key}_scale"] = (largest / _LARGEST).clamp(min=least)
    return stored
