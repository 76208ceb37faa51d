"""A target of a real model's shape with random weights, made where it runs: no checkpoint is read.

Speed depends on shapes alone. What such a model says does not: its text is noise, so drafters that
learn from text have nothing to say about it, and a fixed acceptance must be planted instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from bench.limits import Model
from specrt import ops
from specrt.config import ModelConfig
from specrt.models.arena import ALIGNMENT
from specrt.models.gate_up import ROWS_IN_TURN
from specrt.models.layouts import layer_matrices
from specrt.models.loader import LayerWeights, Weights
from specrt.ops import MatrixKind

DEVIATION = 0.02
"""Of the weights: what models of this family begin their training with."""


@dataclass(frozen=True)
class Spec:
    """What a model's shape leaves open."""

    vocab_size: int
    rope_theta: float
    max_positions: int


SPECS = {
    "Llama-3-8B": Spec(128256, 500000.0, 8192),
    "Vicuna-7B": Spec(32000, 10000.0, 4096),
    "Llama-3-70B/4": Spec(32064, 500000.0, 8192),
}


class SilentTokenizer:
    """A tokenizer whose tokens have no text."""

    special_tokens: Mapping[int, str] = MappingProxyType({})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""


def hf_config(model: Model, spec: Spec) -> dict[str, Any]:
    """The content of a ``config.json``."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": spec.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def random_weights(config: ModelConfig, device: str, dtype: torch.dtype, seed: int = 0) -> Weights:
    """Normal matrices and norms of one, in one arena as the loader lays it out.

    Args:
        config: of the Llama family; biases are left out.
        device: where to.
        dtype: of the matrices.
        seed: of the device's generator, so another device has other weights.
    """
    table = (config.vocab_size, config.hidden_size)
    shapes = [*layer_matrices(config).values()] * config.num_layers + [table, table]
    sizes = [_aligned(math.prod(shape) * dtype.itemsize) for shape in shapes]
    arena = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    matrices = iter(
        part[: math.prod(shape) * dtype.itemsize]
        .view(dtype)
        .view(shape)
        .normal_(0.0, DEVIATION, generator=generator)
        for part, shape in zip(arena.split(sizes), shapes, strict=True)
    )
    norm = torch.ones(config.hidden_size, device=device)
    per_layer = ([next(matrices) for _ in range(4)] for _ in range(config.num_layers))
    layers = tuple(_layer(norm, four) for four in per_layer)
    lm_head, embed = matrices
    # Rows drawn at random may lie in any order.
    return Weights(
        arena, embed, layers, norm, lm_head, lm_head.dtype, is_interleaved=device != "cpu"
    )


def packed(weights: Weights, kind: MatrixKind) -> Weights:
    """The same on the CPU with packed matrices, in memory of their own; embedding and head stay."""

    def one(layer: LayerWeights) -> LayerWeights:
        names = "qkv", "o", "gate_up", "down"
        return replace(layer, **{n: ops.pack_matrix(getattr(layer, n), kind) for n in names})

    return replace(weights, layers=tuple(map(one, weights.layers)))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _layer(norm: torch.Tensor, matrices: Sequence[torch.Tensor]) -> LayerWeights:
    qkv, o, gate_up, down = matrices
    return LayerWeights(
        input_norm=norm,
        qkv=qkv,
        qkv_bias=None,
        q_norm=None,
        k_norm=None,
        o=o,
        o_bias=None,
        post_norm=norm,
        gate_up=gate_up,
        gate_up_bias=None,
        down=down,
        down_bias=None,
    )


def step_bytes(weights: Weights) -> int:
    """What one forward pass reads of them: all but the embedding."""
    return weights.arena.nbytes - weights.embed.nbytes


def transformers_twin(config: Mapping[str, Any], weights: Weights) -> Any:
    """``transformers``' model on the very memory of ``weights``; interleaved rows are copied.

    Args:
        config: as :func:`hf_config` gives it.
        weights: without biases.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    dtype, device = weights.embed.dtype, weights.embed.device
    settings = LlamaConfig(**config, dtype=dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    model.load_state_dict(_state(settings, weights, lambda t: t.to(dtype)), assign=True)
    # Not of the state: what is computed when a model is made.
    model.model.rotary_emb = LlamaRotaryEmbedding(settings).to(device)
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False).eval()


def _state(
    config: Any, weights: Weights, cast: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Views of the matrices under transformers' names."""
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    state = {
        "model.embed_tokens.weight": weights.embed,
        "model.norm.weight": cast(weights.final_norm),
        "lm_head.weight": weights.lm_head,
    }
    for index, layer in enumerate(weights.layers):
        q, k, v = layer.qkv.split([q_rows, kv_rows, kv_rows])
        gate, up = _apart(layer.gate_up, weights.is_interleaved)
        names = {
            "input_layernorm": cast(layer.input_norm),
            "post_attention_layernorm": cast(layer.post_norm),
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.o,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down,
        }
        state |= {f"model.layers.{index}.{name}.weight": part for name, part in names.items()}
    return state


def _apart(gate_up: torch.Tensor, is_interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up; views where each has its rows together."""
    if is_interleaved:
        in_turn = gate_up.view(-1, 2, ROWS_IN_TURN, gate_up.shape[1])
        gate_up = in_turn.transpose(0, 1).reshape(gate_up.shape)
    gate, up = gate_up.chunk(2)
    return gate, up
