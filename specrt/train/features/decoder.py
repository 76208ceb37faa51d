"""A decoder layer of any form in plain torch, over sequences that lie behind one another.

T rows of all sequences together, H hidden size, d head size, Q query heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional

from specrt.config import ModelConfig
from specrt.config.form import RopeChoice
from specrt.device import Device
from specrt.models.dense import dense
from specrt.models.loader import LayerWeights
from specrt.train.layers import ACTIVATIONS, attend


@dataclass(frozen=True)
class Rows:
    """Which rows there are."""

    lengths: Sequence[int]
    """Of the sequences."""
    angles: Mapping[RopeChoice, torch.Tensor]
    """Cosines and sines ``[T, 1, d]`` of each rope choice of the model's layers."""


class FrozenLayer:
    """One layer's weights where and as they are computed with.

    Args:
        config: the model's.
        index: the layer's.
        weights: as loaded, heads not padded.
        cache_dtype: what keys and values are rounded to, as in the engine's cache.
        device: where to compute.
        compute: the dtype of matrices and rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: LayerWeights,
        *,
        cache_dtype: torch.dtype,
        device: Device,
        compute: torch.dtype,
    ) -> None:
        self._config, self._kind = config, config.form.layer(index)
        self._cache_dtype, self._device = cache_dtype, device
        tensors = {field.name: getattr(weights, field.name) for field in fields(weights)}
        self._tensors: dict[str, Any] = {
            name: None if tensor is None else dense(tensor).to(device.place, compute)
            for name, tensor in tensors.items()
        }

    def __call__(self, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """``[T, H]``, what the layer gives for ``hidden [T, H]``."""
        form, scale = self._config.form, self._config.form.residual_scale
        normed = self._normed(hidden, "input_norm") if form.is_pre_normed else hidden
        attended = self._product(self._attention(normed, rows), "o")
        if form.is_post_normed:
            attended = self._normed(attended, "attended_norm")
        after = hidden + _scaled(attended, scale)
        before = hidden if form.is_parallel else after
        if form.is_pre_normed:
            before = self._normed(before, "post_norm") if form.has_mlp_norm else normed
        mlp = self._mlp(before)
        if form.is_post_normed:
            mlp = self._normed(mlp, "mlp_norm")
        return after + _scaled(mlp, scale)

    def _normed(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self._tensors[name], self._tensors.get(f"{name}_bias")
        return normed(self._config, hidden, weight, bias)

    def _product(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        tensors = self._tensors
        return functional.linear(rows, tensors[name], tensors[f"{name}_bias"])

    def _mlp(self, rows: torch.Tensor) -> torch.Tensor:
        form, inner = self._config.form, self._product(rows, "gate_up")
        activation = ACTIVATIONS[form.activation]
        if form.is_gated:
            gate, up = inner.chunk(2, -1)
            return self._product(activation(gate) * up, "down")
        return self._product(activation(inner), "down")

    def _attention(self, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """``[T, Q * d]`` of ``hidden [T, H]``."""
        config, tensors = self._config, self._tensors
        heads = self._product(hidden, "qkv").view(len(hidden), -1, config.head_dim)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if config.has_qk_norm:
            q, k = self._head_normed(q, tensors["q_norm"]), self._head_normed(k, tensors["k_norm"])
        angles = rows.angles[self._kind.rope]
        q, k = _rotated(q, angles), _rotated(k, angles)
        k, v = k.to(self._cache_dtype).to(q.dtype), v.to(self._cache_dtype).to(q.dtype)
        if self._device.is_gpu:
            return self._attended_together(q, k, v, rows.lengths)
        parts = zip(*(x.split(list(rows.lengths)) for x in (q, k, v)), strict=True)
        attended = [self._attended(*(x[None] for x in part))[0] for part in parts]
        return torch.cat(attended).flatten(1)

    def _head_normed(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A norm of each head, or of all together, as the weight is wide."""
        wide = heads.flatten(1).unflatten(1, (-1, len(weight)))
        eps = self._config.rms_norm_eps
        out = functional.rms_norm(wide.float(), weight.shape, weight.float(), eps)
        return out.to(heads.dtype).view(heads.shape)

    def _attended_together(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """All sequences in one launch, padded at the end, where nobody attends to it."""
        longest = max(lengths)
        places = torch.cat([torch.arange(n) + row * longest for row, n in enumerate(lengths)])
        places = self._device.there(places)

        def padded(heads: torch.Tensor) -> torch.Tensor:
            rows = heads.new_zeros(len(lengths) * longest, *heads.shape[1:])
            rows.index_copy_(0, places, heads)
            return rows.view(len(lengths), longest, *heads.shape[1:])

        attended = self._attended(padded(q), padded(k), padded(v)).flatten(0, 1)
        return attended.index_select(0, places).flatten(1)

    def _attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Causal attention of ``[B, n, heads, d]`` each; ``[B, n, Q, d]``."""
        form = self._config.form
        scale = (
            self._config.head_dim**-0.5 if form.attention_scale is None else form.attention_scale
        )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return attend(q, k, v, self._kind, scale=scale, cap=form.attention_cap).transpose(1, 2)


def normed(
    config: ModelConfig,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A norm of the model's kind, computed in float32; ``hidden``'s dtype and shape ``[T, H]``."""
    rows, weight, eps = hidden.float(), weight.float(), config.rms_norm_eps
    if config.form.norm == "layer":
        bias = None if bias is None else bias.float()
        return functional.layer_norm(rows, weight.shape, weight, bias, eps).to(hidden.dtype)
    return functional.rms_norm(rows, weight.shape, weight, eps).to(hidden.dtype)


def _scaled(rows: torch.Tensor, scale: float) -> torch.Tensor:
    return rows if scale == 1.0 else rows * scale


def _rotated(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``heads`` ``[T, h, d]`` by ``angles`` ``[T, 1, d]``: cosines, sines."""
    cos, sin = angles.chunk(2, dim=-1)
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(heads.dtype)
