"""Checkpoints of EESD drafters: the exit layer of a target, its norm and its calibration head.

The exit layer is one decoder layer of the target's own architecture, so ``config.json`` names only
the target, by fingerprint, and the layer N it reads from. The tensors carry the names of a model of
one layer without embedding and head. EESD's authors released no code; the layout is ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from specrt.config import ModelConfig, config_file, config_fingerprint, read_json
from specrt.device import Device
from specrt.draft.files import (
    FORMAT_VERSION,
    QUANTIZATION_KEYS,
    check_bytes,
    is_stored_as_bytes,
    write_files,
)
from specrt.draft.made_for import target_entry
from specrt.models.checkpoint import Checkpoint
from specrt.models.layouts import expected_shapes
from specrt.models.loader import Weights, load_weights
from specrt.models.opening import open_checkpoint
from specrt.models.placement import choose_head_dim, place_weights
from specrt.types import CheckpointError

KIND = "eesd"
NUM_MODES = 2
"""Rows of the calibration head: for greedy targets, and for drafts coupled to sampling ones."""
CALIBRATION = ("calibration.weight", "calibration.bias", "calibration.slope")

_KEYS = (
    "drafter",
    "format_version",
    "exit_layer",
    "target",
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "dtype",
    *QUANTIZATION_KEYS,
)


@dataclass(frozen=True)
class ExitConfig:
    """Where an exit reads, and the target it belongs to."""

    layer: ModelConfig
    """The target's architecture with one layer, of the kind of its last one, and without what
    embeds; ``layer.dtype`` is the checkpoint's."""
    exit_layer: int
    """N: it reads what the target's first N layers give."""
    target_name: str | None = None
    target_fingerprint: str | None = None
    target_adapter: str | None = None
    """Which LoRA adapter was merged into it (:func:`specrt.models.opening.adapter_hash`)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ``config.json`` that mean nothing to us; kept when saving."""
    is_int8: bool = False
    """Whether its file holds the layer's matrices as bytes
    (:func:`specrt.draft.files.in_bytes`)."""

    @classmethod
    def for_target(cls, target: ModelConfig, exit_layer: int, *, name: str) -> ExitConfig:
        """An exit after the target's first ``exit_layer`` layers.

        Args:
            target: the model it will draft for.
            exit_layer: N.
            name: what to call the target in the checkpoint.

        Raises:
            ValueError: N is not 1..L-1.
        """
        if not 1 <= exit_layer < target.num_layers:
            raise ValueError(
                f"exit_layer: expected 1..{target.num_layers - 1} for a target of "
                f"{target.num_layers} layers, got {exit_layer}"
            )
        # What the exit itself has: tokens are embedded, and the head's bias is kept, elsewhere.
        form = replace(
            target.form,
            layers=(target.form.layer(target.num_layers - 1),) if target.form.layers else (),
            embed_scale=1.0,
            position_offset=None,
            has_head_bias=False,
        )
        layer = replace(
            target, num_layers=1, form=form, dtype=torch.bfloat16, float8_scale_suffix=None
        )
        return cls(layer, exit_layer, name, config_fingerprint(target))


@dataclass(frozen=True)
class ExitWeights:
    """What a draft step reads beside the target's own layers."""

    layer: Weights
    """The exit layer and, as its final norm, the exit norm; tables are the target's."""
    calibration: torch.Tensor
    """``[2, H]``: float32, on a GPU of the matrices' dtype."""
    calibration_bias: torch.Tensor
    """``[2]`` float32"""
    calibration_slope: torch.Tensor
    """``[2]`` float32: factor of the draft's own log-odds."""


def exit_tensor_shapes(config: ExitConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by name."""
    weight, bias, slope = CALIBRATION
    shapes = expected_shapes(config.layer, has_tables=False)
    shapes[weight] = (NUM_MODES, config.layer.hidden_size)
    return {**shapes, bias: (NUM_MODES,), slope: (NUM_MODES,)}


def exit_matrices(config: ExitConfig) -> list[str]:
    """The tensors that may be stored as bytes: the exit layer's matrices."""
    shapes = exit_tensor_shapes(config)
    return [key for key, shape in shapes.items() if len(shape) == 2 and key not in CALIBRATION]


def is_exit_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a directory says that it holds an EESD drafter."""
    file = Path(path) / "config.json"
    return file.is_file() and read_json(file).get("drafter") == KIND


def write_exit(
    path: str | os.PathLike[str], config: ExitConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write an EESD drafter; both files are whole before either takes its place.

    Raises:
        ValueError: a tensor is missing or misshaped.
        OSError: the files cannot be written; those of before are left as they were.
    """
    as_bytes = exit_matrices(config) if config.is_int8 else ()
    write_files(path, _as_dict(config), tensors, exit_tensor_shapes(config), as_bytes)


def read_exit(path: str | os.PathLike[str], target: ModelConfig) -> ExitConfig:
    """Read the configuration of an EESD drafter.

    Args:
        path: its directory.
        target: the model it shall draft for.

    Raises:
        CheckpointError: no such file, another kind or version, N out of range, made for another
            target, or matrices in bytes that are damaged.
    """
    file = config_file(path)
    data = read_json(file)
    if data.get("drafter") != KIND:
        raise CheckpointError(f"{file}: drafter: expected {KIND!r}, got {data.get('drafter')!r}")
    if data.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format_version: this version reads {FORMAT_VERSION}, "
            f"got {data.get('format_version')!r}"
        )
    named = data.get("target") or {}
    fingerprint = config_fingerprint(target)
    if not isinstance(named, dict) or named.get("fingerprint") != fingerprint:
        said = (named.get("name"), named.get("fingerprint")) if isinstance(named, dict) else named
        raise CheckpointError(
            f"{file}: made for another target ({said}; this one has fingerprint {fingerprint})"
        )
    check_bytes(file.parent, data)
    return _config(file, data, target)


def read_exit_tensors(path: str | os.PathLike[str], config: ExitConfig) -> dict[str, torch.Tensor]:
    """Every tensor of an EESD drafter as stored, quantised matrices as the values they stand for.

    Args:
        path: its directory.
        config: as :func:`read_exit` gives it.

    Raises:
        CheckpointError: tensors missing, unknown, misshaped, of a wrong dtype or not finite.
    """
    checkpoint, shapes = open_checkpoint(path), exit_tensor_shapes(config)
    for key, info in checkpoint.infos.items():
        if key not in shapes:
            raise CheckpointError(f"{info.file}: unknown tensor {key} {list(info.shape)}")
    return {key: _tensor(checkpoint, key, shape) for key, shape in shapes.items()}


def load_exit(
    path: str | os.PathLike[str],
    config: ExitConfig,
    target: Weights,
    device: Device | None = None,
) -> ExitWeights:
    """Load an exit's tensors, to run with its target's tables, where those are.

    On the CPU matrices keep the checkpoint's dtype, whatever the target's, and are packed as its
    would be: a narrower one is read faster, and its rounding moves no token; a packed head is the
    target's own. On a GPU they get the target's dtype, as its activations have it.

    Args:
        path: its directory.
        config: as :func:`read_exit` gives it.
        target: the target's weights.
        device: where these are; None: on the CPU.

    Raises:
        CheckpointError: tensors missing, unknown, misshaped or not finite.
        ValueError: heads larger than kernels take.
        MemoryError: the device has no room for them.
    """
    device = device or Device()
    dtype = target.dtype if device.is_gpu else config.layer.dtype
    head = target.lm_head
    layer = load_weights(
        path,
        config.layer,
        dtype,
        tables=(target.embed, head.to(dtype) if isinstance(head, torch.Tensor) else head),
        others=CALIBRATION,
        head_dim=choose_head_dim(config.layer, device.place),
        packing=target.packing.of_drafters(head),
    )
    checkpoint, shapes = Checkpoint(path), exit_tensor_shapes(config)
    matrix, *vectors = (
        _tensor(checkpoint, key, shapes[key]).float().contiguous() for key in CALIBRATION
    )
    if device.is_gpu:
        layer, matrix = place_weights(layer, device), matrix.to(dtype)
    layer = replace(layer, head_bias=target.head_bias)  # where it is already
    return ExitWeights(layer, *map(device.there, (matrix, *vectors)))


def _config(file: Path, data: Mapping[str, Any], target: ModelConfig) -> ExitConfig:
    number, last = data.get("exit_layer"), target.num_layers - 1
    if type(number) is not int or not 1 <= number <= last:
        raise CheckpointError(f"{file}: exit_layer: expected 1..{last}, got {number!r}")
    dtype = getattr(torch, str(data.get("dtype")), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(
            f"{file}: dtype: expected float32, bfloat16 or float16, got {data.get('dtype')!r}"
        )
    extra = {key: value for key, value in data.items() if key not in _KEYS}
    said = data["target"]
    config = ExitConfig.for_target(target, number, name=said.get("name"))
    return replace(
        config,
        layer=replace(config.layer, dtype=dtype),
        target_adapter=said.get("adapter"),
        extra=extra,
        is_int8=is_stored_as_bytes(data),
    )


def _as_dict(config: ExitConfig) -> dict[str, Any]:
    return {
        **config.extra,
        "drafter": KIND,
        "format_version": FORMAT_VERSION,
        "exit_layer": config.exit_layer,
        "target": target_entry(config),
        # For people; the target's own configuration is what counts.
        "hidden_size": config.layer.hidden_size,
        "vocab_size": config.layer.vocab_size,
        "num_hidden_layers": 1,
        "dtype": str(config.layer.dtype).removeprefix("torch."),
    }


def _tensor(checkpoint: Checkpoint, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    info = checkpoint.infos.get(key)
    if info is None:
        raise CheckpointError(f"{checkpoint.directory}: missing tensor {key} {list(shape)}")
    if info.shape != shape:
        raise CheckpointError(f"{info.file}: {key}: expected {list(shape)}, got {list(info.shape)}")
    tensor = checkpoint.tensor(key)
    if not tensor.is_floating_point():
        raise CheckpointError(f"{info.file}: {key}: expected floating point, got {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{info.file}: {key}: has NaN or infinite values")
    return tensor
