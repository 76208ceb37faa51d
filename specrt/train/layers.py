"""The parts of a decoder layer as torch modules to train, under the checkpoints' own names.

Shapes: B sequences, m positions each, H hidden size, d head size. Heads' elements lie as they are
stored, and are put into the kernels' order (:mod:`specrt.models.heads`) before they are turned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from specrt.config import Form, LayerKind, ModelConfig
from specrt.config.form import RopeChoice
from specrt.models.heads import HeadLayout
from specrt.models.rope import rope_of, rope_table

_FIRST_POSITIONS = 512  # of a rotary table that grows

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda rows: functional.gelu(rows, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda rows: functional.relu(rows).square(),
}


class Norm(nn.Module):
    """A norm of a form's kind that keeps its input's dtype, so that autocast does not fall back to
    a slow path.

    Args:
        size: of what is normed.
        eps: added to its mean square, or variance.
        form: whose kind; the default's is RMS.
        has_bias: whether this norm has one.
    """

    def __init__(
        self, size: int, eps: float, form: Form | None = None, *, has_bias: bool = False
    ) -> None:
        super().__init__()
        form = form or Form()
        self.shape, self.eps, self.offset = (size,), eps, form.norm_offset
        self.is_centred = form.norm == "layer"
        self.weight = nn.Parameter(torch.ones(size) - self.offset) if form.has_norm_weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if has_bias else None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor | None = self.weight
        if weight is not None:
            weight = (weight + self.offset if self.offset else weight).to(rows.dtype)
        if not self.is_centred:
            return functional.rms_norm(rows, self.shape, weight, self.eps)
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        return functional.layer_norm(rows, self.shape, weight, bias, self.eps)


class GatedMlp(nn.Module):
    """``down(silu(gate a) * (up b))``."""

    def __init__(self, hidden_size: int, intermediate_size: int, out_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, out_size, bias=False)

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(gate)) * self.up_proj(up))
        return out


class Mlp(nn.Module):
    """A decoder layer's, of any form."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_size, wide = config.hidden_size, config.intermediate_size
        has_bias, is_gated = config.has_mlp_bias, config.form.is_gated
        self.gate_proj = nn.Linear(hidden_size, wide, bias=has_bias) if is_gated else None
        self.up_proj = nn.Linear(hidden_size, wide, bias=has_bias)
        self.down_proj = nn.Linear(wide, hidden_size, bias=has_bias)
        self.activation = ACTIVATIONS[config.form.activation]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        inner = self.up_proj(rows)
        if self.gate_proj is None:
            inner = self.activation(inner)
        else:
            inner = self.activation(self.gate_proj(rows)) * inner
        out: torch.Tensor = self.down_proj(inner)
        return out


class Attention(nn.Module):
    """Causal attention of a model's first layer; biases and norms of q and k by configuration."""

    order: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        form, self.head_dim = config.form, config.head_dim
        self.kind = form.layer(0)
        self.cap = form.attention_cap
        self.scale = config.head_dim**-0.5 if form.attention_scale is None else form.attention_scale
        hidden_size, has_bias = config.hidden_size, config.has_attention_bias
        q_rows = config.num_heads * config.head_dim
        kv_rows = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(hidden_size, q_rows, bias=has_bias)
        self.k_proj = nn.Linear(hidden_size, kv_rows, bias=has_bias)
        self.v_proj = nn.Linear(hidden_size, kv_rows, bias=has_bias)
        self.o_proj = nn.Linear(q_rows, hidden_size, bias=config.has_output_bias)
        sizes = (q_rows, kv_rows) if form.is_qk_norm_full else (config.head_dim,) * 2
        has_norm, eps = config.has_qk_norm, config.rms_norm_eps
        offset = Form(norm_offset=form.norm_offset)  # of whatever form, RMS with a weight
        self.q_norm = Norm(sizes[0], eps, offset) if has_norm else None
        self.k_norm = Norm(sizes[1], eps, offset) if has_norm else None
        order = HeadLayout.of(config, config.head_dim).order()
        self.is_stored_as_turned = torch.equal(order, torch.arange(config.head_dim))
        self.register_buffer("order", order, persistent=False)

    def project(
        self, hidden: torch.Tensor, rope: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values: ``[B, heads, m, d]`` each."""
        q, k, v = (layer(hidden) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._heads(q, self.q_norm), self._heads(k, self.k_norm)
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return _rotated(q, rope), _rotated(k, rope), v

    def _heads(self, rows: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """``[B, heads, m, d]`` of q or k, normed, in the order in which they are turned."""
        if norm is not None:
            rows = norm(rows.unflatten(-1, (-1, *norm.shape))).flatten(-2)
        heads: torch.Tensor = rows.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads if self.is_stored_as_turned else heads.index_select(-1, self.order)

    def merge(self, attended: torch.Tensor) -> torch.Tensor:
        """``[B, heads, m, d]`` to ``[B, m, H]``."""
        out: torch.Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out

    def forward(self, hidden: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(hidden, rope)
        return self.merge(attend(q, k, v, self.kind, scale=self.scale, cap=self.cap))


class Rope(nn.Module):
    """The rotary table, which grows with the longest sequence seen; never part of a state dict.

    Args:
        config: the model's.
        choice: of which of its layers.
    """

    table: torch.Tensor

    def __init__(self, config: ModelConfig, choice: RopeChoice = "main") -> None:
        super().__init__()
        self._config, self._choice = config, choice
        self.register_buffer("table", self._made(_FIRST_POSITIONS), persistent=False)

    def rows(self, num_positions: int) -> torch.Tensor:
        """``[num_positions, d]``: cosines, then sines, of positions 0 on."""
        if num_positions > len(self.table):
            self.table = self._made(2 * num_positions).to(self.table.device)
        return self.table[:num_positions]

    def _made(self, num_positions: int) -> torch.Tensor:
        size, theta, scaling = rope_of(self._config, self._choice)
        head_dim = self._config.head_dim
        return rope_table(head_dim, theta, num_positions, scaling, rotary_dim=size)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kind: LayerKind,
    *,
    scale: float,
    cap: float | None,
) -> torch.Tensor:
    """Causal attention of whole sequences, ``[B, heads, n, d]`` each.

    Args:
        q, k, v: rotated; a head of keys serves neighbouring queries.
        kind: of the layer: its window.
        scale, cap: as :class:`specrt.config.Form` has them.
    """
    size, window, mask = q.shape[2], kind.window, None
    if cap is not None or (window is not None and window < size):
        places = torch.arange(size, device=q.device)
        behind = places[:, None] - places  # how far a key lies back
        mask = (behind >= 0) & (behind < (window or size))
    if cap is None:
        return functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = cap * torch.tanh(scale * (q @ k.transpose(2, 3)).float() / cap)
    assert mask is not None, "made for a cap"
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype)
    return shares @ v


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
