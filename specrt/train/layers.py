"""The parts of a decoder layer as torch modules to train, under the checkpoints' own names.

Shapes: B sequences, m positions each, H hidden size, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from specrt.config import ModelConfig
from specrt.models.rope import rope_table

_FIRST_POSITIONS = 512  # of a rotary table that grows


class Norm(nn.Module):
    """RMS norm that keeps its input's dtype, so that autocast does not fall back to a slow path."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(rows.dtype)
        return functional.rms_norm(rows, weight.shape, weight, self.eps)


class GatedMlp(nn.Module):
    """``down(silu(gate a) * (up b))``; a and b are the same thing in a decoder layer."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, out_size: int, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, out_size, bias=bias)

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(gate)) * self.up_proj(up))
        return out


class Attention(nn.Module):
    """Causal attention of Llama's form; biases and norms of q and k by configuration."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden_size, has_bias = config.hidden_size, config.has_attention_bias
        q_rows = config.num_heads * config.head_dim
        kv_rows = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(hidden_size, q_rows, bias=has_bias)
        self.k_proj = nn.Linear(hidden_size, kv_rows, bias=has_bias)
        self.v_proj = nn.Linear(hidden_size, kv_rows, bias=has_bias)
        self.o_proj = nn.Linear(q_rows, hidden_size, bias=config.has_output_bias)
        has_norm = config.has_qk_norm
        self.q_norm = Norm(config.head_dim, config.rms_norm_eps) if has_norm else None
        self.k_norm = Norm(config.head_dim, config.rms_norm_eps) if has_norm else None

    def project(
        self, hidden: torch.Tensor, rope: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values: ``[B, heads, m, d]`` each."""
        q, k, v = (
            layer(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return _rotated(q, rope), _rotated(k, rope), v

    def merge(self, attended: torch.Tensor) -> torch.Tensor:
        """``[B, heads, m, d]`` to ``[B, m, H]``."""
        out: torch.Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out

    def forward(self, hidden: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(hidden, rope)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.merge(attended)


class Rope(nn.Module):
    """The rotary table, which grows with the longest sequence seen; never part of a state dict."""

    table: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("table", self._made(_FIRST_POSITIONS), persistent=False)

    def rows(self, num_positions: int) -> torch.Tensor:
        """``[num_positions, d]``: cosines, then sines, of positions 0 on."""
        if num_positions > len(self.table):
            self.table = self._made(2 * num_positions).to(self.table.device)
        return self.table[:num_positions]

    def _made(self, num_positions: int) -> torch.Tensor:
        config = self._config
        return rope_table(config.head_dim, config.rope_theta, num_positions, config.rope_scaling)


def product_flop(module: nn.Module, inputs_alone: Sequence[nn.Module] = ()) -> int:
    """Of a row of a module's matrix products, forward and back.

    Args:
        module: whose linear layers are each run once.
        inputs_alone: those whose inputs ask for no gradient.
    """
    num_products = {id(layer): 2 for layer in inputs_alone}
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(2 * num_products.get(id(layer), 3) * layer.weight.numel() for layer in linear)


def _rotated(heads: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate ``[B, heads, m, d]`` by ``[m, d]`` (or ``[B, 1, m, d]``) cosines and sines."""
    cos, sin = rope.to(heads.dtype).chunk(2, dim=-1)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
