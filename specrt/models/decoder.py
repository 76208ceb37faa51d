"""What a target launches, layer by layer, on buffers that stay, so that a graph may hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from specrt import ops
from specrt.cache import KVCache
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.models.gate_up import launch_gated
from specrt.models.heads import norm_eps
from specrt.models.layouts import matrix_shapes
from specrt.models.loader import LayerWeights, Weights
from specrt.models.placement import check_placed
from specrt.models.rope import RotaryTable, rotary_table
from specrt.models.step import GpuScratch, StepRows, Workspace


class Heads(NamedTuple):
    """A layer's queries, keys and values, views of one buffer: ``[B, N, heads, d]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Decoder:
    """Embedding, decoder layers and head, and the buffers that they share.

    Args:
        config: the architecture.
        weights: as :func:`specrt.models.loader.load_weights` gives them, heads padded or not.
        device: where they run.
        activation_dtype: of the buffers between the kernels.
        rope: the rotary table of another model, used where this one's would be the same.
        others: shapes of further matrices that :meth:`launch_linear` multiplies by.

    Raises:
        ValueError: the weights do not lie as the device takes them.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        device: Device,
        activation_dtype: torch.dtype,
        rope: RotaryTable | None,
        others: Sequence[tuple[int, int]],
    ) -> None:
        check_placed(weights, device)
        self.config, self.weights, self.device = config, weights, device
        self.activation_dtype = activation_dtype
        head_dim = weights.layers[0].o.shape[1] // config.num_heads
        self._padded = replace(config, head_dim=head_dim)  # as the kernels run it
        self._head_eps = norm_eps(config.rms_norm_eps, config.head_dim, head_dim)
        self.rope = rotary_table(config, head_dim, device, rope)
        self._cos_sin = self.rope.reaching(0)
        self._workspace = Workspace.make(
            self._padded, 0, 0, activation_dtype, device, weights.packed_inputs
        )
        self._scratch: GpuScratch | None = None
        if device.is_gpu:
            shapes = [*matrix_shapes(self._padded), *others]
            self._scratch = GpuScratch(self._padded, shapes, device)

    # --- buffers ------------------------------------------------------------------------------

    def reserve(
        self, batch: int, num_nodes: int, num_positions: int, *, has_logits: bool = False
    ) -> None:
        """Make buffers and rotary table large enough; captured graphs are dropped if they move.

        Args:
            batch: B sequences.
            num_nodes: N rows of each.
            num_positions: of the sequences' pages.
            has_logits: whether these rows go through the model's own head.
        """
        if min(num_positions, self.rope.limit) > self._cos_sin.shape[0]:
            longer = self.rope.reaching(num_positions)
            self._forget_buffers()  # first: an interrupt must not leave launches over what is gone
            self._cos_sin = longer
        rows = batch * num_nodes
        logit_rows = rows if has_logits else 0
        work = self._workspace.reaching(self._padded, rows, logit_rows, self.device)
        if work is not self._workspace:
            self._forget_buffers()
            self._workspace = work
        if self._scratch is not None:
            self._scratch.prepare(batch, num_nodes, num_positions)

    def _forget_buffers(self) -> None:
        """Launches over them are stale."""
        self.device.forget()

    # --- launches: on buffers that :meth:`reserve` has made, so that a graph may hold them ----
    # `is_open` is as for `ops.linear`: where all sequences are closed, what is written stays as it
    # is, or becomes anything.

    def embed_tokens(
        self,
        tokens: torch.Tensor,
        out: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """Rows of the embedding: ``tokens [M]`` int32 into ``out [M, H]`` of any float type; which
        rows of it they were into ``ids [M]``, as for ``ops.embed``."""
        ops.embed(tokens, self.weights.embed, out, ids=ids, is_open=is_open)

    def launch_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        rows: StepRows,
        cache: KVCache,
        out: torch.Tensor,
        *,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """One decoder layer over B·N rows; its keys and values are appended.

        Args:
            index: which layer.
            hidden: ``[B * N, H]`` of the activations' dtype, read; the workspace's own rows may be
                overwritten. Rows may be strided.
            rows: where they stand.
            cache: this model's.
            out: ``[B * N, H]``, written; may be ``hidden``.
            is_open: ``[B]`` int32 or None.
        """
        if rows.is_chained:
            self.launch_kv(index, hidden, rows, cache, is_open=is_open)
            self.launch_rest(index, hidden, rows, cache, out, is_open=is_open)
            return
        heads = self._project(index, hidden, rows, is_open)
        append = ops.Append(heads.k, heads.v, rows.depth, self._cos_sin)
        self._finish(index, (heads, hidden), rows, cache, out, append, is_open)

    def launch_kv(
        self,
        index: int,
        hidden: torch.Tensor,
        rows: StepRows,
        cache: KVCache,
        *,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """Append a layer's keys and values of ``hidden [B * N, H]``, and nothing more."""
        heads = self._project(index, hidden, rows, is_open)
        ops.rope_append(
            *heads, rows.depth, rows.kv_len, rows.first_node, rows.num_nodes,
            rows.block_tables[cache.group_of(index)], self._cos_sin, *cache.layer(index),
        )  # fmt: skip

    def launch_rest(
        self,
        index: int,
        hidden: torch.Tensor,
        rows: StepRows,
        cache: KVCache,
        out: torch.Tensor,
        *,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """The rest of :meth:`launch_layer` behind :meth:`launch_kv`, between which this model has
        launched nothing else; the bits are the same."""
        heads = self._heads(rows)
        self._finish(index, (heads, hidden), rows, cache, out, None, is_open)

    def launch_head(
        self,
        hidden: torch.Tensor,
        feature: torch.Tensor,
        logits: torch.Tensor | None,
        maxima: ops.TileMaxima | ops.DraftMaxima | None = None,
        *,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """Final norm of ``hidden [M, H]`` into ``feature``, its ``logits [M, V]`` and their
        ``maxima``."""
        ops.rms_norm(hidden, self.weights.final_norm, self.config.rms_norm_eps, out=feature)
        if logits is not None:
            head = self.weights.lm_head
            self.launch_linear(feature, head, out=logits, maxima=maxima, is_open=is_open)

    def _project(
        self, index: int, hidden: torch.Tensor, rows: StepRows, is_open: torch.Tensor | None
    ) -> Heads:
        """Of ``norm(hidden)``; not rotated yet."""
        layer, count = self.weights.layers[index], hidden.shape[0]
        normed, qkv = self._workspace.normed[:count], self._workspace.qkv[:count]
        ops.rms_norm(hidden, layer.input_norm, self.config.rms_norm_eps, out=normed)
        self.launch_linear(normed, layer.qkv, layer.qkv_bias, out=qkv, is_open=is_open)
        heads = self._heads(rows)
        for part, norm in ((heads.q, layer.q_norm), (heads.k, layer.k_norm)):
            if norm is not None:
                flat = part.view(count, -1, self._padded.head_dim)
                ops.rms_norm(flat, norm, self._head_eps, out=flat)
        return heads

    def _heads(self, rows: StepRows) -> Heads:
        """Where :meth:`_project` leaves them."""
        config, shape = self.config, rows.depth.shape
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        qkv = self._workspace.qkv[: shape[0] * shape[1]]
        return Heads(*qkv.view(*shape, sum(sizes), -1).split(sizes, dim=2))

    def _finish(
        self,
        index: int,
        inputs: tuple[Heads, torch.Tensor],
        rows: StepRows,
        cache: KVCache,
        out: torch.Tensor,
        append: ops.Append | None,
        is_open: torch.Tensor | None,
    ) -> None:
        """``out = between + MLP(between)``, ``between = hidden + O(attention(heads))``, for
        ``inputs`` = (heads, hidden)."""
        config, (heads, hidden) = self.config, inputs
        layer, count = self.weights.layers[index], hidden.shape[0]
        attended, between = self._workspace.attended[:count], self._workspace.hidden[:count]
        ops.tree_attention(
            heads.q,
            *cache.layer(index),
            rows.block_tables[cache.group_of(index)],
            rows.kv_len,
            rows.first_node,
            rows.num_nodes,
            rows.ancestors,
            config.head_dim**-0.5,
            out=attended.view(*rows.depth.shape, config.num_heads, -1),
            workspace=None if self._scratch is None else self._scratch.attention,
            append=append,
            is_open=is_open,
        )
        self.launch_linear(attended, layer.o, layer.o_bias, hidden, out=between, is_open=is_open)
        self._mlp(layer, between, out, is_open)

    def _mlp(
        self,
        layer: LayerWeights,
        hidden: torch.Tensor,
        out: torch.Tensor,
        is_open: torch.Tensor | None,
    ) -> None:
        """``out = hidden + down(silu(gate) * up)`` of ``norm(hidden)``."""
        work, rows = self._workspace, hidden.shape[0]
        normed, activated = work.normed[:rows], work.activated[:rows]
        ops.rms_norm(hidden, layer.post_norm, self.config.rms_norm_eps, out=normed)
        launch_gated(
            normed,
            layer.gate_up,
            layer.gate_up_bias,
            work.gate_up[:rows],
            activated,
            self._linear_workspace,
            is_interleaved=self.weights.is_interleaved,
            is_open=is_open,
        )
        self.launch_linear(activated, layer.down, layer.down_bias, hidden, out=out, is_open=is_open)

    def launch_linear(
        self,
        x: torch.Tensor,
        weight: ops.Matrix,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        *,
        out: torch.Tensor,
        maxima: ops.TileMaxima | ops.DraftMaxima | None = None,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """``ops.linear`` by one of this model's matrices, or of the others that it was told of."""
        ops.linear(
            x, weight, bias, residual, out, self._linear_workspace, maxima=maxima, is_open=is_open
        )

    @property
    def _linear_workspace(self) -> torch.Tensor:
        return self._workspace.linear if self._scratch is None else self._scratch.linear
