"""Tiny random checkpoints of every supported family, written by ``transformers`` itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specrt.config import ModelConfig
from specrt.draft.eesd.checkpoint import ExitConfig, exit_tensor_shapes, write_exit
from specrt.draft.fspad.checkpoint import DraftConfig, tensor_shapes, write_checkpoint

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,  # enough for logits that differ
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

_CLASSES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": _LLAMA3_ROPE, "rms_norm_eps": 1e-5, "head_dim": 16},
    ),
    "llama_linear_rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LINEAR_ROPE}),
    "llama_biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 32}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "attention_bias": False}),
}
FAMILIES = tuple(_CLASSES)


def make_checkpoint(
    family: str,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """Write a random checkpoint of ``family`` (one of ``FAMILIES``) in ``dtype``; return its model.

    Norms and biases are random too, as their defaults (1 and 0) would hide mistakes. ``overrides``
    go to the configuration class, so they have the names of ``config.json``.
    """
    config_class, model_class, extra = _CLASSES[family]
    config = config_class(**{**_SIZES, **extra, **overrides})
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("norm.weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.1 * noise)
    model = model.to(dtype).eval()
    model.save_pretrained(path)
    return model


def edit_config(path: Path, **changes: Any) -> None:
    """Set keys of a checkpoint's ``config.json``; ``None`` becomes null, ``...`` removes a key."""
    file = path / "config.json"
    data = json.loads(file.read_text())
    for key, value in changes.items():
        data.pop(key, None)
        if value is not ...:
            data[key] = value
    file.write_text(json.dumps(data))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a single-file safetensors checkpoint in place."""
    file = path / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    edit(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def store_as_bin(path: Path, *, is_zip: bool = True) -> None:
    """Turn a safetensors checkpoint into PyTorch's own format, shards and index included."""
    for file in sorted(path.glob("*.safetensors")):
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(file), path / name, _use_new_zipfile_serialization=is_zip)
        file.unlink()
    index = path / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace(".safetensors", ".bin")
        text = text.replace('"model-', '"pytorch_model-')
        (path / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def store_as_float8(path: Path) -> dict[str, torch.Tensor]:
    """Turn a checkpoint into specrt's float8 storage; return the weights it then stands for.

    Scales alternate between one a tensor and one a row.
    """
    exact: dict[str, torch.Tensor] = {}

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for number, (key, tensor) in enumerate(sorted(tensors.items())):
            weight = tensor.float()
            if weight.dim() == 2:
                peak = weight.abs().amax(dim=1, keepdim=True) if number % 2 else weight.abs().amax()
                scale = torch.exp2(torch.ceil(torch.log2(peak / 448.0)))
                tensors[key] = (weight / scale).to(torch.float8_e4m3fn)
                tensors[f"{key}_scale"] = scale.reshape(-1)
                weight = tensors[key].float() * scale
            exact[key] = weight

    edit_tensors(path, quantise)
    storage = {"format": "float8_e4m3fn", "scale_suffix": "_scale"}
    edit_config(path, specrt_storage=storage, dtype="bfloat16")
    return exact


def make_draft_checkpoint(
    target: Path,
    path: Path,
    arch: str = "fspad",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Write a random drafter of ``arch`` for a target's directory in our format; its tensors."""
    config = DraftConfig.for_target(ModelConfig.from_directory(target), arch, name="tiny")
    config = replace(config, layer=replace(config.layer, dtype=dtype))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.2 * noise if "layernorm" in name else 0.15 * noise
    write_checkpoint(path, config, tensors)
    return tensors


def make_official_draft(
    path: Path, target: Path, arch: str, dtype: torch.dtype = torch.float16, *, is_bin: bool = False
) -> dict[str, torch.Tensor]:
    """A directory as the authors of FSPAD and EAGLE publish them, less the embedding; its tensors.

    Their ``config.json`` is the target's with one layer, and says nothing of the drafter.
    """
    config = DraftConfig.for_target(ModelConfig.from_directory(target), arch, name="x")
    tensors = random_draft_tensors(config, dtype)
    path.mkdir()
    given = json.loads((target / "config.json").read_text())
    given |= {"architectures": ["Model"], "num_hidden_layers": 1, "authors_note": {"by": "them"}}
    (path / "config.json").write_text(json.dumps(given))
    if is_bin:
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        save_file(tensors, path / "model.safetensors")
    return tensors


def random_draft_tensors(config: DraftConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Small random tensors of a drafter."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        for key, shape in tensor_shapes(config).items()
    }


def make_exit_checkpoint(
    target: Path,
    path: Path,
    exit_layer: int,
    *,
    noise: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """An EESD drafter as training begins it: the target's last layer and final norm; its tensors.

    After all layers but the last one it is the target itself, so every draft is accepted.
    ``noise`` makes it err. The calibration head is random.
    """
    target_config = ModelConfig.from_directory(target)
    config = ExitConfig.for_target(target_config, exit_layer, name="tiny")
    config = replace(config, layer=replace(config.layer, dtype=dtype))
    stored = load_file(target / "model.safetensors")
    last = f"model.layers.{target_config.num_layers - 1}."
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in exit_tensor_shapes(config).items():
        random = torch.randn(shape, generator=generator)
        if name.startswith("calibration."):
            tensors[name] = 0.1 * random + float(name == "calibration.slope")
        else:
            copied = stored[name.replace("model.layers.0.", last)].float()
            tensors[name] = copied + noise * copied.std() * random
    write_exit(path, config, tensors)
    return tensors
