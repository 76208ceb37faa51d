"""What an adapter's ``adapter_config.json`` (peft) says, as far as it can be merged."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrt.config.directory import ADAPTER_CONFIG, checkpoint_directory, read_json
from specrt.types import CheckpointError

# Read here, or of training, or told by the tensors themselves.
_HARMLESS = """
    alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern
    layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save peft_type peft_version
    qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_dora
    use_rslora
"""
# Others change the model's own weights before training, to which the adapter then belongs.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """How a LoRA adapter's products are scaled and which way they lie."""

    file: Path
    base: str | None
    """What the model it was trained for is called."""
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    """By patterns of modules' names, where they differ."""
    alphas: Mapping[str, float]
    is_rank_stabilised: bool
    """Scaled by the root of the rank."""
    is_transposed: bool
    """Matrices are stored ``[K, N]``, as GPT-2's are, where their shape does not tell."""
    has_magnitudes: bool
    """DoRA: rows have lengths of their own."""

    def rank_of(self, module: str) -> int:
        """Columns of a module's B."""
        rank: int = _matched(self.ranks, module, self.rank)
        return rank

    def scaling_of(self, module: str) -> float:
        """What a module's product is multiplied by."""
        rank = self.rank_of(module)
        divisor = math.sqrt(rank) if self.is_rank_stabilised else rank
        alpha: float = _matched(self.alphas, module, self.alpha)
        return alpha / divisor


def read_adapter_config(path: str | os.PathLike[str]) -> AdapterConfig:
    """Read an adapter's configuration.

    Args:
        path: its directory.

    Raises:
        CheckpointError: there is none, it is malformed, or it is of an adapter that is no LoRA or
            does more than to add products to matrices.
    """
    directory = checkpoint_directory(path)
    file = directory / ADAPTER_CONFIG
    if not file.exists():
        raise CheckpointError(f"{directory}: expected a LoRA adapter, got no {ADAPTER_CONFIG}")
    data = read_json(file)
    _refuse(data, file)
    base = data.get("base_model_name_or_path")
    return AdapterConfig(
        file,
        base if isinstance(base, str) else None,
        _number(data, "r", 8, file, int),
        _number(data, "lora_alpha", 8, file, float),
        _numbers(data, "rank_pattern", file, int),
        _numbers(data, "alpha_pattern", file, float),
        bool(data.get("use_rslora")),
        bool(data.get("fan_in_fan_out")),
        bool(data.get("use_dora")),
    )


def _refuse(data: Mapping[str, Any], file: Path) -> None:
    kind = data.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type: expected LORA, got {kind!r}")
    if data.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias: expected none, got {data['bias']!r}")
    start = data.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights: {start!r} changes the model's own weights (peft converts "
            "such an adapter as it saves it)"
        )
    for key, value in data.items():
        if value and key not in _HARMLESS.split() and not key.startswith("_"):
            raise CheckpointError(
                f"{file}: {key}: not supported, and {str(value)[:40]!r} may change what the "
                "adapter does"
            )


def _number(data: Mapping[str, Any], key: str, default: int, file: Path, kind: type) -> Any:
    value = data.get(key, default)
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise CheckpointError(f"{file}: {key}: expected a positive number, got {value!r}")
    return value


def _numbers(data: Mapping[str, Any], key: str, file: Path, kind: type) -> dict[str, Any]:
    pattern = data.get(key) or {}
    if not isinstance(pattern, Mapping):
        raise CheckpointError(f"{file}: {key}: expected an object, got {pattern!r}")
    for name in pattern:
        try:
            re.compile(name)
        except re.error as error:
            raise CheckpointError(f"{file}: {key}: no pattern: {name!r}") from error
    return {name: _number(pattern, name, 0, file, kind) for name in pattern}


def _matched(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a name ends with, as peft looks them up."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
