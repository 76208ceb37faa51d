"""One decoder layer on given buffers, of whatever :class:`~specrt.config.Form`.

It is two branches, attention and the MLP, each of which is normed before, after, or both, and added
to what went in; parallel ones are added to the same. What a form does not ask for is not launched:
of a Llama's layer that is two norms, four products, an activation and attention.

H hidden size, I intermediate size, M rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from specrt import ops
from specrt.config import Form, ModelConfig
from specrt.models.heads import norm_eps
from specrt.models.loader import LayerWeights


class Heads(NamedTuple):
    """A layer's queries, keys and values, views of one buffer: ``[B, N, heads, d]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Places(Protocol):
    """Where rows stand: B sequences of N each (what the kernels read)."""

    @property
    def depth(self) -> torch.Tensor:
        """``[B, N]`` int32: position less ``kv_len``."""

    @property
    def kv_len(self) -> torch.Tensor:
        """``[B]`` int32"""

    @property
    def first_node(self) -> torch.Tensor:
        """``[B]`` int32: the tree node that the first row is."""

    @property
    def num_nodes(self) -> torch.Tensor:
        """``[B]`` int32: rows that count."""

    @property
    def block_table(self) -> torch.Tensor:
        """``[B, max_pages]`` int32"""


class Rooms(Protocol):
    """Where a layer leaves what it makes on its way, for at least M rows."""

    @property
    def normed(self) -> torch.Tensor:
        """``[M, H]``"""

    @property
    def qkv(self) -> torch.Tensor:
        """``[M, (Q + 2K) * d]``"""

    @property
    def attended(self) -> torch.Tensor:
        """``[M, Q * d]``"""

    @property
    def hidden(self) -> torch.Tensor:
        """``[M, H]``: between the branches."""

    @property
    def gate_up(self) -> torch.Tensor:
        """``[M, 2I]`` (``[M, I]`` where nothing is gated): before the activation; of no width where
        one launch gives ``activated``."""

    @property
    def activated(self) -> torch.Tensor:
        """``[M, I]``"""


@dataclass(frozen=True)
class LayerBuffers:
    """What a layer's launches use beside its weights and operands."""

    rooms: Rooms
    linear: torch.Tensor | None
    """Workspace of ``linear``."""
    attention: torch.Tensor | None
    """Workspace of ``tree_attention`` on a GPU."""
    branch: torch.Tensor | None = None
    """``[M, H]``: what a branch gives, where :func:`adds_apart`."""


def adds_apart(form: Form) -> bool:
    """Whether what a branch gives is added by a launch of its own, behind a norm or times s."""
    return form.is_post_normed or form.residual_scale != 1.0


def launch_norm(
    form: Form,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """A norm of a form's kind: ``hidden [M, H]``, rows may be strided, into ``out``."""
    if form.norm == "layer":
        ops.layer_norm(hidden, weight, bias, eps, out=out)
    else:
        ops.rms_norm(hidden, weight, eps, out=out)


def changes_logits(form: Form) -> bool:
    """Whether logits are more than what the head's product gives."""
    return form.logit_scale != 1.0 or form.logit_cap is not None


def launch_logit_change(form: Form, logits: torch.Tensor) -> None:
    """Scale and cap ``logits [M, V]`` float32, in place, if the form does."""
    if changes_logits(form):
        ops.scale_add(logits, form.logit_scale, cap=form.logit_cap, out=logits)


class DecoderLayer:
    """A layer's weights, and what its form makes of them.

    Where ``is_open`` is asked, it is as for ``ops.linear``: if all sequences are closed, what is
    written stays as it is, or becomes anything.

    Args:
        config: the model's, heads of their true size.
        weights: this layer's.
        index: which layer of the model it is.
        is_interleaved: how rows of gate and up lie (:mod:`specrt.models.gate_up`).
    """

    def __init__(
        self, config: ModelConfig, weights: LayerWeights, index: int, *, is_interleaved: bool
    ) -> None:
        self.weights = weights
        self.kind = config.form.layer(index)
        self._form, self._eps = config.form, config.rms_norm_eps
        self._is_interleaved = is_interleaved
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
        head_dim = weights.o.shape[1] // config.num_heads
        self._head_eps = norm_eps(config.rms_norm_eps, config.head_dim, head_dim)
        scale = config.form.attention_scale
        self._scale = config.head_dim**-0.5 if scale is None else scale

    def project(
        self,
        hidden: torch.Tensor,
        rows: Places,
        buffers: LayerBuffers,
        is_open: torch.Tensor | None = None,
    ) -> Heads:
        """Queries, keys and values of ``hidden [B * N, H]``, not rotated yet.

        What attention reads stays in :attr:`Rooms.normed`, where a parallel MLP may read it too.
        """
        weights, rooms, count = self.weights, buffers.rooms, hidden.shape[0]
        if weights.input_norm is not None:
            normed = rooms.normed[:count]
            self._norm(hidden, weights.input_norm, weights.input_norm_bias, normed)
            hidden = normed
        qkv = rooms.qkv[:count]
        ops.linear(
            hidden, weights.qkv, weights.qkv_bias, None, qkv, buffers.linear, is_open=is_open
        )
        heads = self.heads(rows, buffers)
        for part, norm in ((heads.q, weights.q_norm), (heads.k, weights.k_norm)):
            if norm is not None:
                flat = part.view(count, -1, len(norm))  # a head, or all of them, at a time
                ops.rms_norm(flat, norm, self._head_eps, out=flat)
        return heads

    def heads(self, rows: Places, buffers: LayerBuffers) -> Heads:
        """Where :meth:`project` leaves them."""
        size, count = rows.depth.shape
        sizes = [self._num_heads, self._num_kv_heads, self._num_kv_heads]
        qkv = buffers.rooms.qkv[: size * count]
        return Heads(*qkv.view(size, count, sum(sizes), -1).split(sizes, dim=2))

    def finish(
        self,
        heads: Heads,
        hidden: torch.Tensor,
        ancestors: torch.Tensor,
        rows: Places,
        cache: tuple[torch.Tensor, torch.Tensor],
        buffers: LayerBuffers,
        out: torch.Tensor,
        *,
        append: ops.Append | None = None,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """The layer behind :meth:`project`.

        Args:
            heads: as that gives them; rotated, unless they come with ``append``.
            hidden: ``[B * N, H]``, what it was given; may be :attr:`Rooms.hidden`.
            ancestors: ``[B, N, W]`` int64 bits.
            rows: where they stand.
            cache: the layer's keys and values.
            buffers: as for :meth:`project`.
            out: ``[B * N, H]``, written; may be ``hidden``.
            append: keys and values that are not in the cache yet.
            is_open: ``[B]`` int32 or None.
        """
        weights, rooms = self.weights, buffers.rooms
        between = rooms.hidden[: hidden.shape[0]]
        if self._form.is_parallel:  # before `hidden` may be written
            self.activate(hidden, buffers, is_open)
        attended = self.attend(heads.q, ancestors, rows, cache, buffers, append, is_open)
        branch = attended, weights.o, weights.o_bias, weights.attended_norm
        self._add(branch, hidden, buffers, between, is_open)
        if not self._form.is_parallel:
            self.activate(between, buffers, is_open)
        activated = rooms.activated[: hidden.shape[0]]
        branch = activated, weights.down, weights.down_bias, weights.mlp_norm
        self._add(branch, between, buffers, out, is_open)

    def attend(
        self,
        q: torch.Tensor,
        ancestors: torch.Tensor,
        rows: Places,
        cache: tuple[torch.Tensor, torch.Tensor],
        buffers: LayerBuffers,
        append: ops.Append | None = None,
        is_open: torch.Tensor | None = None,
        *,
        window: int | None = None,
        num_sinks: int = 0,
    ) -> torch.Tensor:
        """``[B * N, Q * d]`` of ``q [B, N, Q, d]``, in :attr:`Rooms.attended`; ``window`` and
        ``num_sinks`` as for ``ops.tree_attention``, beside the layer's own window."""
        size, count = rows.depth.shape
        attended = buffers.rooms.attended[: size * count]
        ops.tree_attention(
            q,
            *cache,
            rows.block_table,
            rows.kv_len,
            rows.first_node,
            rows.num_nodes,
            ancestors,
            self._scale,
            out=attended.view(size, count, self._num_heads, -1),
            workspace=buffers.attention,
            append=append,
            window=window,
            num_sinks=num_sinks,
            is_open=is_open,
            sliding_window=self.kind.window,
            cap=self._form.attention_cap,
        )
        return attended

    def activate(
        self, hidden: torch.Tensor, buffers: LayerBuffers, is_open: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What ``down`` multiplies, ``[M, I]`` of ``hidden [M, H]``: in :attr:`Rooms.activated`."""
        weights, form, rooms, count = self.weights, self._form, buffers.rooms, hidden.shape[0]
        normed, activated = rooms.normed[:count], rooms.activated[:count]
        if weights.post_norm is not None:
            self._norm(hidden, weights.post_norm, weights.post_norm_bias, normed)
        elif not form.is_parallel:
            normed = hidden
        given = normed, weights.gate_up, weights.gate_up_bias, None
        if self._is_interleaved:
            ops.linear(*given, activated, buffers.linear, is_gated=True, is_open=is_open)
            return activated
        between = rooms.gate_up[:count]
        ops.linear(*given, between, buffers.linear, is_open=is_open)
        ops.activate(between, activated, form.activation, form.is_gated)
        return activated

    def _add(
        self,
        branch: tuple[torch.Tensor, ops.Matrix, torch.Tensor | None, torch.Tensor | None],
        residual: torch.Tensor,
        buffers: LayerBuffers,
        out: torch.Tensor,
        is_open: torch.Tensor | None,
    ) -> None:
        """``out = residual + s n(W x + b)`` for a ``branch`` (x, W, b, n)."""
        x, matrix, bias, norm = branch
        scale = self._form.residual_scale
        if norm is None and scale == 1.0:
            ops.linear(x, matrix, bias, residual, out, buffers.linear, is_open=is_open)
            return
        assert buffers.branch is not None, "as adds_apart says"
        result = buffers.branch[: x.shape[0]]
        ops.linear(x, matrix, bias, None, result, buffers.linear, is_open=is_open)
        if norm is not None:
            self._norm(result, norm, None, result)
        ops.scale_add(result, scale, residual, out=out)

    def _norm(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        launch_norm(self._form, hidden, weight, bias, self._eps, out)
