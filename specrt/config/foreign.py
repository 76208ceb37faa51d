"""Checkpoints of other programs and kinds, named for what they are in place of what they lack."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

_ADAPTER = "a LoRA adapter (lora= takes it, beside its model)"
_ORIGINAL = "the authors' own format (take the model's Hugging Face version, or convert it)"
_MLX = "quantised or stored for MLX (take the model it was made from)"
_QUANTISED = "(quantised; take the model it was made from)"
_OTHERS = "(save_pretrained of transformers 4 turns them into safetensors)"

# Patterns of file names, the most telling ones first.
_FILES = {
    "adapter_config.json": _ADAPTER,
    "adapter_model.*": _ADAPTER,
    "*.npz": _MLX,
    "consolidated*": _ORIGINAL,
    "params.json": _ORIGINAL,
    "tekken.json": _ORIGINAL,
    "model-*-of-*.safetensors": "shards without their model.safetensors.index.json",
    "pytorch_model-*-of-*.bin": "shards without their pytorch_model.bin.index.json",
    "tf_model*": f"TensorFlow weights {_OTHERS}",
    "flax_model*": f"Flax weights {_OTHERS}",
    "*.onnx": "ONNX (take the model it was made from)",
    "onnx": "ONNX (take the model it was made from)",
    "*.safetensors": "weights under a name of their own (expected model.safetensors)",
    "*.bin": "weights under a name of their own (expected pytorch_model.bin)",
    "*.pt*": "weights under a name of their own (expected pytorch_model.bin)",
}
_USUAL_FILES = ("model.safetensors", "pytorch_model.bin")
# Patterns of tensors' names; what is quantised otherwise says so in config.json as a rule.
_TENSORS = {
    r"\.lora_[AB]\b|\.lora_embedding_[AB]\b|^base_model\.model\.": _ADAPTER,
    r"\.g_idx$": f"GPTQ {_QUANTISED}",
    r"\.qzeros$": f"AWQ or GPTQ {_QUANTISED}",
    r"\.weight_packed$": f"compressed-tensors {_QUANTISED}",
    r"\.weight\.(absmax|quant_map|quant_state)|\.SCB$": f"bitsandbytes {_QUANTISED}",
    r"\.weight_scale(_inv|_2)$": f"float8 with scales {_QUANTISED}",
    r"\.weight_scale$": f"int8 or float8 with scales {_QUANTISED}",
    r"_proj\.scales$": _MLX,
    r"^(model\.)?tok_embeddings\.weight$|\.attention\.wq\.": _ORIGINAL,
    r"^(module|_orig_mod)\.": "saved from a wrapped module (strip the first part of each name)",
    r"(^|\.)(vision_tower|visual|vision_model|multi_modal_projector|mm_projector)\.": "multimodal",
    r"^language_model\.": "multimodal",
    r"\.experts\.": "a mixture of experts",
}


def foreign_files(directory: Path) -> str | None:
    """What a directory's files say it is, where it is no model in Hugging Face's layout."""
    for pattern, meaning in _FILES.items():
        for file in sorted(directory.glob(pattern)):
            if file.name not in _USUAL_FILES:
                return f"{file.name} is {meaning}"
    return None


def foreign_tensors(keys: Collection[str]) -> str | None:
    """What the names of tensors say a checkpoint is, where they are not a plain model's."""
    for pattern, meaning in _TENSORS.items():
        found = next(filter(re.compile(pattern).search, keys), None)
        if found is not None:
            return f"{found}: this checkpoint is {meaning}"
    return None
