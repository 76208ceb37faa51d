"""Write a GGUF file of random weights in a real model's shape, for us and llama.cpp to run.

The output is the embedding, as in the models whose shapes these are. As llama.cpp's own quantiser
does, it is Q6_K in files of 4 bits; where a matrix is no whole K blocks wide (Qwen2.5-0.5B's 896)
it is Q4_1 in place of Q4_K, Q8_0 in place of Q6_K.

usage: python -m bench.random_gguf --shapes llama-1b --kind q4_k --out FILE          (needs: gguf)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bench.byte_tokens import BOS, EOS, MERGES, byte_tokens
from bench.cpu_models import SHAPES, CpuModel
from bench.random_blocks import BLOCKS, FLOATS, Bytes, random_rows, row_bytes

KINDS = (*FLOATS, *BLOCKS)
_OF_HEAD = {"q4_0": "q6_k", "q4_1": "q6_k", "q4_k": "q6_k"}
_NARROW = {"q4_k": "q4_1", "q6_k": "q8_0"}
_PRE_TOKENIZERS = {"llama": "llama-bpe", "qwen2": "qwen2"}
_LAST_NORM = "output_norm.weight"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """``(N, K)``; of a norm or a bias ``(N,)``."""

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        *rows, num_inputs = self.shape
        return math.prod(rows) * row_bytes(self.kind, num_inputs)

    def made(self, seed: int) -> Bytes:
        """Its bytes; of a norm ones, of a bias zeros.

        The last norm has ones of either sign: a model whose output is its embedding would else
        repeat its last token for ever.
        """
        if len(self.shape) == 2:
            return random_rows(self.kind, *self.shape, seed)
        values = np.full(self.shape, 0.0 if self.name.endswith("bias") else 1.0, np.float32)
        if self.name == _LAST_NORM:
            values *= np.random.default_rng(seed).choice([-1.0, 1.0], self.shape)
        raw: Bytes = values.view(np.uint8)
        return raw


def write_gguf(model: CpuModel, kind: str, out: Path, seed: int = 0) -> None:
    """Write the file, a tensor at a time.

    Args:
        model: whose shape.
        kind: one of :data:`KINDS`, of its matrices.
        out: where to.
        seed: of the weights.
    """
    writer = gguf.GGUFWriter(out, model.family)
    _add_config(writer, model)
    _add_tokenizer(writer, model)
    specs = list(_tensors(model, kind))
    for spec in specs:
        stored = gguf.GGMLQuantizationType[spec.kind.upper()]
        writer.add_tensor_info(
            spec.name, spec.shape, np.dtype(np.float32), spec.num_bytes, raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, spec in enumerate(specs):
        writer.write_tensor_data(spec.made(seed + index))
    writer.close()


def _tensors(model: CpuModel, kind: str) -> Iterator[TensorSpec]:
    one, hidden = model.shape, model.shape.hidden_size
    q, kv = one.num_heads * one.head_dim, one.num_kv_heads * one.head_dim
    matrices = {
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "ffn_gate": (one.intermediate_size, hidden),
        "ffn_up": (one.intermediate_size, hidden),
        "ffn_down": (hidden, one.intermediate_size),
    }
    yield _matrix("token_embd.weight", _OF_HEAD.get(kind, kind), (one.vocab_size, hidden))
    for layer in range(one.num_layers):
        for norm in ("attn_norm", "ffn_norm"):
            yield TensorSpec(f"blk.{layer}.{norm}.weight", "f32", (hidden,))
        for name, shape in matrices.items():
            yield _matrix(f"blk.{layer}.{name}.weight", kind, shape)
            if model.has_qkv_bias and name in ("attn_q", "attn_k", "attn_v"):
                yield TensorSpec(f"blk.{layer}.{name}.bias", "f32", shape[:1])
    yield TensorSpec(_LAST_NORM, "f32", (hidden,))


def _matrix(name: str, kind: str, shape: tuple[int, int]) -> TensorSpec:
    block = BLOCKS.get(kind)
    is_whole = block is None or shape[1] % block.num_weights == 0
    return TensorSpec(name, kind if is_whole else _NARROW[kind], shape)


def _add_config(writer: Any, model: CpuModel) -> None:
    one = model.shape
    writer.add_context_length(model.max_positions)
    writer.add_embedding_length(one.hidden_size)
    writer.add_block_count(one.num_layers)
    writer.add_feed_forward_length(one.intermediate_size)
    writer.add_head_count(one.num_heads)
    writer.add_head_count_kv(one.num_kv_heads)
    writer.add_key_length(one.head_dim)
    writer.add_value_length(one.head_dim)
    writer.add_rope_dimension_count(one.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_vocab_size(one.vocab_size)


def _add_tokenizer(writer: Any, model: CpuModel) -> None:
    tokens = byte_tokens(model.shape.vocab_size)
    kinds = {BOS: gguf.TokenType.CONTROL, EOS: gguf.TokenType.CONTROL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZERS[model.family])
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(tokens.index(BOS))
    writer.add_eos_token_id(tokens.index(EOS))


def main() -> None:
    """The command line."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\nusage")[0])
    arguments.add_argument("--shapes", choices=list(SHAPES), default="llama-1b")
    arguments.add_argument("--kind", choices=KINDS, default="q4_k", help="of the matrices")
    arguments.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = arguments.parse_args()
    write_gguf(SHAPES[args.shapes], args.kind, args.out)


if __name__ == "__main__":
    main()
