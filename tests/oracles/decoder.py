"""A target of any form over one text, in float64: embeddings, layers, head.

Written from the table of ``specrt.config.Form``. Pairs of a head that are turned lie half a head
apart, the turned ones first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from specrt.config import Form, ModelConfig
from specrt.models.loader import LayerWeights, Weights

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def run(
    config: ModelConfig, weights: Weights, ids: list[int]
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Logits ``[T, V]``, what each layer gives ``[T, H]``, and the feature ``[T, H]``."""
    form = config.form
    hidden = weights.embed[ids].double()
    hidden = hidden * torch.tensor(form.embed_scale, dtype=weights.dtype).double()
    if form.position_offset is not None:
        hidden = hidden + weights.positions[form.position_offset :][: len(ids)].double()
    states = []
    for index, layer in enumerate(weights.layers):
        hidden = _layer(config, layer, index, hidden)
        states.append(hidden)
    feature = _norm(config, hidden, weights.final_norm, weights.final_norm_bias)
    logits = _linear(feature, weights.lm_head, weights.head_bias) * form.logit_scale
    return _capped(logits, form.logit_cap), states, feature


def _layer(config: ModelConfig, weights: LayerWeights, index: int, x: torch.Tensor) -> torch.Tensor:
    form, scale = config.form, config.form.residual_scale
    normed = x
    if form.is_pre_normed:
        normed = _norm(config, x, weights.input_norm, weights.input_norm_bias)
    attended = _attention(config, weights, index, normed)
    if form.is_post_normed:
        attended = _norm(config, attended, weights.attended_norm)
    h = x + scale * attended
    before = x if form.is_parallel else h
    if form.is_pre_normed and form.has_mlp_norm:
        before = _norm(config, before, weights.post_norm, weights.post_norm_bias)
    elif form.is_parallel:
        before = normed
    mlp = _mlp(form, weights, before)
    if form.is_post_normed:
        mlp = _norm(config, mlp, weights.mlp_norm)
    return h + scale * mlp


def _mlp(form: Form, weights: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    inner = _linear(x, weights.gate_up, weights.gate_up_bias)
    activation = ACTIVATIONS[form.activation]
    if form.is_gated:
        gate, up = inner.chunk(2, dim=1)
        inner = activation(gate) * up
    else:
        inner = activation(inner)
    return _linear(inner, weights.down, weights.down_bias)


def _attention(
    config: ModelConfig, weights: LayerWeights, index: int, x: torch.Tensor
) -> torch.Tensor:
    form, kind, size = config.form, config.form.layer(index), config.head_dim
    sizes = [config.num_heads * size, config.num_kv_heads * size, config.num_kv_heads * size]
    q, k, v = _linear(x, weights.qkv, weights.qkv_bias).split(sizes, dim=1)
    q, k = (_qk_norm(config, t, n) for t, n in ((q, weights.q_norm), (k, weights.k_norm)))
    q, k, v = (t.unflatten(1, (-1, size)).transpose(0, 1) for t in (q, k, v))
    q, k = (_turned(config, kind.rope, t) for t in (q, k))
    groups = config.num_heads // config.num_kv_heads
    k, v = (t.repeat_interleave(groups, dim=0) for t in (k, v))
    scale = size**-0.5 if form.attention_scale is None else form.attention_scale
    scores = _capped(scale * q @ k.transpose(1, 2), form.attention_cap)
    behind = torch.arange(len(x))[:, None] - torch.arange(len(x))  # how far a key lies back
    is_seen = (behind >= 0) & (behind < (kind.window or len(x)))
    probabilities = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
    return _linear((probabilities @ v).transpose(0, 1).flatten(1), weights.o, weights.o_bias)


def _qk_norm(config: ModelConfig, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None:
        return x
    rows = x.unflatten(1, (-1, len(weight)))
    normed = rows * (rows.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
    return (normed * weight.double()).flatten(1)


def _turned(config: ModelConfig, choice: str, x: torch.Tensor) -> torch.Tensor:
    """``x [heads, T, d]``"""
    if choice == "none":
        return x
    form = config.form
    size = form.rotary_dim or config.head_dim
    theta = config.rope_theta if choice == "main" else form.local_rope_theta
    frequencies = torch.zeros(config.head_dim // 2, dtype=torch.float64)
    frequencies[: size // 2] = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _norm(
    config: ModelConfig, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    if config.form.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weight.double()
    return x if bias is None else x + bias.double()


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = x @ weight.double().T
    return product if bias is None else product + bias.double()


def _capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)
