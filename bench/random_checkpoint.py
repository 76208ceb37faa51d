"""Write a checkpoint directory of random weights in a real model's shape, for us and transformers.

As :mod:`bench.random_gguf`, whose file of the same seed has other weights. Matrices are bfloat16.

usage: python -m bench.random_checkpoint --shapes llama-1b --out DIR
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from bench.byte_tokens import BOS, EOS, MERGES, byte_tokens
from bench.cpu_models import SHAPES, CpuModel
from bench.random_target import DEVIATION

_LAST_NORM = "model.norm.weight"
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def write_checkpoint(model: CpuModel, out: Path, seed: int = 0) -> None:
    """Write the directory's files, weights a tensor at a time.

    Args:
        model: whose shape.
        out: the directory, made if it is not there.
        seed: of the weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    vocab_size = model.shape.vocab_size
    (out / "config.json").write_text(json.dumps(hf_config(model), indent=2))
    _tokenizer(vocab_size).save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    _write_weights(_shapes(model), out / "model.safetensors", seed)


def hf_config(model: CpuModel) -> dict[str, Any]:
    """The content of ``config.json``."""
    one = model.shape
    return {
        "model_type": model.family,
        "architectures": [_ARCHITECTURES[model.family]],
        "torch_dtype": "bfloat16",
        "vocab_size": one.vocab_size,
        "hidden_size": one.hidden_size,
        "intermediate_size": one.intermediate_size,
        "num_hidden_layers": one.num_layers,
        "num_attention_heads": one.num_heads,
        "num_key_value_heads": one.num_kv_heads,
        "head_dim": one.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": True,
        "bos_token_id": one.vocab_size - 2,
        "eos_token_id": one.vocab_size - 1,
    }


def _tokenizer(vocab_size: int) -> Tokenizer:
    tokens = byte_tokens(vocab_size)
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    return tokenizer


def _shapes(model: CpuModel) -> dict[str, tuple[int, ...]]:
    one, hidden, wide = model.shape, model.shape.hidden_size, model.shape.intermediate_size
    q, kv = one.num_heads * one.head_dim, one.num_kv_heads * one.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (one.vocab_size, hidden)}
    for layer in range(one.num_layers):
        own: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
        }
        if model.has_qkv_bias:
            rows = {"q": q, "k": kv, "v": kv}
            own |= {f"self_attn.{name}_proj.bias": (size,) for name, size in rows.items()}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes | {_LAST_NORM: (hidden,)}


def _write_weights(shapes: Mapping[str, tuple[int, ...]], out: Path, seed: int) -> None:
    """A safetensors file: the length of a header, the header, the tensors."""
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * torch.bfloat16.itemsize
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with out.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(_made(name, shape, generator).view(torch.uint8).numpy().data)


def _made(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A matrix; of a norm ones, of the last norm ones of either sign, of a bias zeros.

    A model whose output is its embedding would, but for these signs, repeat its last token.
    """
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    if len(shape) == 2:
        return tensor.normal_(0.0, DEVIATION, generator=generator)
    if name == _LAST_NORM:
        return tensor.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    return tensor if name.endswith("bias") else tensor.fill_(1.0)


def main() -> None:
    """The command line."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\nusage")[0])
    arguments.add_argument("--shapes", choices=list(SHAPES), default="llama-1b")
    arguments.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = arguments.parse_args()
    write_checkpoint(SHAPES[args.shapes], args.out)


if __name__ == "__main__":
    main()
