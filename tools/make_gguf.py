"""Write a target as GGUF, which llama.cpp can be timed on with the very same weights.

Reads through specrt's loader, so the bundled float8 model works too. Plain-rotary Llama and Mistral
models with a byte-level BPE ``tokenizer.json`` are supported.

usage: python -m tools.make_gguf TARGET OUT.gguf [--dtype float32|bfloat16]     (needs: gguf)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from specrt.config import ModelConfig, read_json
from specrt.models.loader import load_weights
from specrt.models.tokenizer import Tokenizer, load_tokenizer
from specrt.targets import target_path
from tools.export_checkpoint import DTYPES, state_dict

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def make_gguf(target: str, out: Path, dtype: str) -> None:
    """Write ``target``'s weights, in ``dtype`` (vectors in float32), and its tokenizer.

    Raises:
        ValueError: an architecture or a tokenizer this cannot express.
        CheckpointError: the target cannot be loaded.
    """
    source = target_path(target)
    config = ModelConfig.from_directory(source)
    if config.architecture not in ("llama", "mistral") or config.rope_scaling is not None:
        raise ValueError(f"{source}: expected a Llama or Mistral model with plain rotary embedding")
    if config.has_attention_bias or config.has_mlp_bias:
        raise ValueError(f"{source}: biases have no place in GGUF's llama architecture")
    weights = load_weights(source, config, DTYPES[dtype])
    writer = gguf.GGUFWriter(out, "llama")
    _add_config(writer, config)
    _add_tokenizer(writer, config, read_json(source / "tokenizer.json"))
    _add_use(writer, load_tokenizer(source))
    for key, value in state_dict(config, weights).items():
        _add_tensor(writer, _gguf_name(key), _reordered(key, value, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, config: ModelConfig, tokenizer: dict[str, Any]) -> None:
    bpe = tokenizer.get("model", {})
    if bpe.get("type") != "BPE":
        raise ValueError("tokenizer.json: expected a BPE model")
    added = tokenizer.get("added_tokens", [])
    by_id = {index: token for token, index in bpe["vocab"].items()}
    by_id |= {token["id"]: token["content"] for token in added}
    special = {token["id"] for token in added if token.get("special")}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list([by_id.get(i, f"<unused{i}>") for i in range(config.vocab_size)])
    kinds = dict.fromkeys(by_id, gguf.TokenType.NORMAL)
    kinds |= dict.fromkeys(special, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in range(config.vocab_size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    if config.bos_id is not None:
        writer.add_bos_token_id(config.bos_id)
    if config.eos_ids:
        writer.add_eos_token_id(config.eos_ids[0])


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """What llama.cpp calls the way in which texts are cut."""
    cutting = tokenizer.get("pre_tokenizer") or {}
    steps = cutting.get("pretokenizers", [cutting])
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] == ["ByteLevel"] and steps[-1].get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
    return "default"  # enough for ids; specrt refuses to cut texts so


def _add_use(writer: Any, tokenizer: Tokenizer) -> None:
    """How texts and chats are begun."""
    writer.add_add_bos_token(bool(tokenizer.encode("")))
    if tokenizer.inner.chat_template is not None:
        writer.add_chat_template(tokenizer.inner.chat_template)


def _gguf_name(key: str) -> str:
    if key in _TOP_NAMES:
        return _TOP_NAMES[key]
    index, name = key.removeprefix("model.layers.").split(".", 1)
    return f"blk.{index}.{_NAMES[name.removesuffix('.weight')]}.weight"


def _reordered(key: str, value: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Hugging Face keeps the two halves of a rotary pair apart; llama.cpp side by side."""
    if not key.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    halves = value.view(-1, 2, config.head_dim // 2, config.hidden_size)
    return halves.transpose(1, 2).reshape(value.shape)


def _add_tensor(writer: Any, name: str, value: torch.Tensor) -> None:
    if value.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        raw = value.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=kind)
    else:
        writer.add_tensor(name, value.contiguous().numpy().astype(np.float32, copy=False))


def main() -> None:
    """The command line."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\nusage")[0])
    arguments.add_argument("target", help="a checkpoint directory or 'builtin'")
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = arguments.parse_args()
    make_gguf(args.target, args.out, args.dtype)


if __name__ == "__main__":
    main()
