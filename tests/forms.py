"""Small random targets of any form, without a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from specrt.config import Form, LayerKind, ModelConfig
from specrt.models.arena import Arena
from specrt.models.loader import LayerWeights, Weights

VOCAB = 97
NUM_LAYERS = 3
MAX_POSITIONS = 400
_LAYERS = tuple(
    LayerKind(window, rope) for window, rope in ((9, "local"), (None, "none"), (40, "main"))
)

FORMS: Mapping[str, tuple[Form, Mapping[str, Any]]] = {
    "llama": (Form(), {}),
    "layer norm": (Form(norm="layer", has_norm_bias=True), {"has_output_bias": True}),
    "post": (
        Form(is_pre_normed=False, is_post_normed=True, is_qk_norm_full=True),
        {"has_qk_norm": True},
    ),
    "both": (
        Form(
            is_post_normed=True,
            activation="gelu_tanh",
            attention_scale=0.3,
            attention_cap=2.5,
            embed_scale=8.1,
            logit_cap=3.0,
            local_rope_theta=500.0,
            layers=_LAYERS,
        ),
        {"has_qk_norm": True},
    ),
    "parallel": (
        Form(
            norm="layer",
            is_parallel=True,
            has_mlp_norm=False,
            is_gated=False,
            activation="gelu",
            rotary_dim=6,
            has_head_bias=True,
        ),
        {"has_attention_bias": True, "has_output_bias": True, "has_mlp_bias": True},
    ),
    "parallel, two norms": (
        Form(norm="layer", has_norm_bias=True, is_parallel=True, residual_scale=0.6, rotary_dim=8),
        {},
    ),
    "scaled": (Form(residual_scale=0.4, logit_scale=0.25, embed_scale=3.3), {}),
    "learned positions": (
        Form(
            norm="layer",
            has_norm_bias=True,
            is_gated=False,
            activation="relu2",
            position_offset=2,
            has_head_bias=True,
            layers=(LayerKind(rope="none"),) * NUM_LAYERS,
        ),
        {"has_mlp_bias": True},
    ),
}
"""Each arrangement and each option at least once."""


def form_config(form: Form, **changes: Any) -> ModelConfig:
    """A small model's, of heads that are 16 wide."""
    config = ModelConfig(
        architecture="llama",
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_layers=NUM_LAYERS,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        max_positions=MAX_POSITIONS,
        has_attention_bias=False,
        has_output_bias=False,
        has_mlp_bias=False,
        has_qk_norm=False,
        is_head_tied=False,
        bos_id=1,
        eos_ids=(2,),
        dtype=torch.float32,
        form=form,
    )
    return replace(config, **changes)


def named_config(name: str, **changes: Any) -> ModelConfig:
    """Of one of :data:`FORMS`."""
    form, own = FORMS[name]
    return form_config(form, **{**own, **changes})


class _Random:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, num_rows: int, num_columns: int) -> torch.Tensor:
        rows = torch.randn(num_rows, num_columns, generator=self._generator)
        return 1.5 * rows / num_columns**0.5

    def vector(self, size: int, around: float, is_there: bool = True) -> torch.Tensor | None:
        noise = 0.3 * torch.randn(size, generator=self._generator)
        return around + noise if is_there else None


def form_weights(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Random ones, in rows of ``dtype``; norms and biases too."""
    form, make, hidden = config.form, _Random(seed), config.hidden_size
    head_bias = make.vector(config.vocab_size, 0.0, form.has_head_bias)
    positions = None
    if form.position_offset is not None:
        positions = make.matrix(config.max_positions + form.position_offset, hidden).to(dtype)
    final_norm = make.vector(hidden, 1.0)
    assert final_norm is not None, "asked for"
    embed, lm_head = (make.matrix(config.vocab_size, hidden) for _ in range(2))
    layers = [_layer(config, make) for _ in range(config.num_layers)]
    names = "qkv", "o", "gate_up", "down"
    matrices = [getattr(layer, name) for layer in layers for name in names]
    arena, placed = _in_one_arena([*matrices, 2 * lm_head, embed], dtype)
    *rest, lm_head, embed = placed
    in_layers = iter(rest)
    return Weights(
        arena=arena,
        embed=embed,
        layers=tuple(replace(one, **{name: next(in_layers) for name in names}) for one in layers),
        final_norm=final_norm,
        lm_head=lm_head,
        dtype=dtype,
        may_interleave=form.is_gated and form.activation == "silu",
        final_norm_bias=make.vector(hidden, 0.0, form.has_norm_bias),
        head_bias=head_bias,
        positions=positions,
    )


def _in_one_arena(
    matrices: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    arena = Arena(dtype.itemsize * matrix.numel() for matrix in matrices)
    pieces = [arena.take(dtype.itemsize * matrix.numel()) for matrix in matrices]
    placed = [
        piece.view(dtype).view(matrix.shape).copy_(matrix)
        for piece, matrix in zip(pieces, matrices, strict=True)
    ]
    return arena.memory, placed


def _layer(config: ModelConfig, make: _Random) -> LayerWeights:
    form, hidden, wide, size = (
        config.form,
        config.hidden_size,
        config.intermediate_size,
        config.head_dim,
    )
    q_rows, kv_rows = config.num_heads * size, config.num_kv_heads * size
    inner = 2 * wide if form.is_gated else wide
    has_post_norm = form.is_pre_normed and form.has_mlp_norm
    is_full, has_bias = form.is_qk_norm_full, form.has_norm_bias
    return LayerWeights(
        input_norm=make.vector(hidden, 1.0, form.is_pre_normed),
        qkv=make.matrix(q_rows + 2 * kv_rows, hidden),
        qkv_bias=make.vector(q_rows + 2 * kv_rows, 0.0, config.has_attention_bias),
        q_norm=make.vector(q_rows if is_full else size, 1.0, config.has_qk_norm),
        k_norm=make.vector(kv_rows if is_full else size, 1.0, config.has_qk_norm),
        o=make.matrix(hidden, q_rows),
        o_bias=make.vector(hidden, 0.0, config.has_output_bias),
        post_norm=make.vector(hidden, 1.0, has_post_norm),
        gate_up=make.matrix(inner, hidden),
        gate_up_bias=make.vector(inner, 0.0, config.has_mlp_bias),
        down=make.matrix(hidden, wide),
        down_bias=make.vector(hidden, 0.0, config.has_mlp_bias),
        input_norm_bias=make.vector(hidden, 0.0, form.is_pre_normed and has_bias),
        post_norm_bias=make.vector(hidden, 0.0, has_post_norm and has_bias),
        attended_norm=make.vector(hidden, 1.0, form.is_post_normed),
        mlp_norm=make.vector(hidden, 1.0, form.is_post_normed),
    )
