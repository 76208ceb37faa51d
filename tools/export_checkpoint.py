"""Write a target as a plain Hugging Face directory, for any other program to read.

The bundled model is stored in float8 beside power-of-two scales, which only specrt reads; here it
is multiplied out. Any other target specrt loads works too.

usage: python -m tools.export_checkpoint TARGET OUT [--dtype float32|bfloat16|float16]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from specrt.config import ModelConfig, gguf_path, read_json
from specrt.models.loader import LayerWeights, Weights, load_weights
from specrt.models.tokenizer import load_tokenizer
from specrt.targets import target_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def state_dict(config: ModelConfig, weights: Weights) -> dict[str, torch.Tensor]:
    """The weights under Hugging Face's keys, as views: packed matrices are taken apart."""
    state = {"model.embed_tokens.weight": weights.embed, "model.norm.weight": weights.final_norm}
    if not config.is_head_tied:
        state["lm_head.weight"] = weights.lm_head
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        state |= {prefix + name: value for name, value in _layer(config, layer).items()}
    return state


def _layer(config: ModelConfig, layer: LayerWeights) -> dict[str, torch.Tensor]:
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    intermediate_size = config.intermediate_size
    packed = [
        ("self_attn", ("q", "k", "v"), [q_rows, kv_rows, kv_rows], layer.qkv, layer.qkv_bias),
        ("self_attn", ("o",), [config.hidden_size], layer.o, layer.o_bias),
        ("mlp", ("gate", "up"), [intermediate_size] * 2, layer.gate_up, layer.gate_up_bias),
        ("mlp", ("down",), [config.hidden_size], layer.down, layer.down_bias),
    ]
    state = {
        "input_layernorm.weight": layer.input_norm,
        "post_attention_layernorm.weight": layer.post_norm,
    }
    for block, names, sizes, matrix, bias in packed:
        for kind, tensor in (("weight", matrix), ("bias", bias)):
            if tensor is not None:
                for name, rows in zip(names, tensor.split(sizes), strict=True):
                    state[f"{block}.{name}_proj.{kind}"] = rows
    if layer.q_norm is not None and layer.k_norm is not None:
        state["self_attn.q_norm.weight"] = layer.q_norm
        state["self_attn.k_norm.weight"] = layer.k_norm
    return state


def export(target: str, out: Path, dtype: str) -> None:
    """Write ``target`` to the directory ``out``.

    Args:
        target: a Hugging Face directory, a GGUF file of a plain Llama, or a name.
        out: made if missing.
        dtype: of all tensors.

    Raises:
        CheckpointError: the target cannot be loaded.
        ValueError: a GGUF file of anything else.
    """
    source = target_path(target)
    config = ModelConfig.from_directory(source)
    weights = load_weights(source, config, DTYPES[dtype])
    out.mkdir(parents=True, exist_ok=True)
    # Copies, since safetensors refuses views that share memory.
    state = {
        key: value.to(DTYPES[dtype], copy=True)
        for key, value in state_dict(config, weights).items()
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    is_gguf = gguf_path(source) is not None
    settings = _settings(config) if is_gguf else read_json(source / "config.json")
    settings.pop("specrt_storage", None)
    settings.pop("torch_dtype", None)
    settings["dtype"] = dtype
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if is_gguf:
        load_tokenizer(source).inner.save_pretrained(out)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _settings(config: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` for what a GGUF file says.

    Raises:
        ValueError: it is of another family than Llama's, or has positions of its own.
    """
    if config.architecture != "llama" or config.rope_scaling is not None:
        raise ValueError("target: expected of a GGUF file a Llama without rope scaling")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.is_head_tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
    }


def main() -> None:
    """The command line."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\nusage")[0])
    arguments.add_argument("target", help="a checkpoint directory or 'builtin'")
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--dtype", choices=DTYPES, default="float32")
    args = arguments.parse_args()
    export(args.target, args.out, args.dtype)


if __name__ == "__main__":
    main()
