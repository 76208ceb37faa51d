"""What a target launches, layer by layer, on buffers that stay, so that a graph may hold them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from specrt import ops
from specrt.cache import KVCache
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.models.layer import (
    DecoderLayer,
    LayerBuffers,
    changes_logits,
    launch_logit_change,
    launch_norm,
)
from specrt.models.layouts import matrix_shapes
from specrt.models.loader import Weights
from specrt.models.placement import check_placed
from specrt.models.rope import RotaryTable, rotary_tables
from specrt.models.step import GpuScratch, StepRows, Workspace


class Decoder:
    """Embedding, decoder layers and head, and the buffers that they share.

    Args:
        config: the architecture.
        weights: as :func:`specrt.models.loader.load_weights` gives them, heads padded or not.
        device: where they run.
        activation_dtype: of the buffers between the kernels.
        ropes: rotary tables of another model, used where this one's would be the same.
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
        ropes: Collection[RotaryTable],
        others: Sequence[tuple[int, int]],
    ) -> None:
        check_placed(weights, device)
        self.config, self.weights, self.device = config, weights, device
        self.activation_dtype = activation_dtype
        head_dim = weights.layers[0].o.shape[1] // config.num_heads
        self._padded = replace(config, head_dim=head_dim)  # as the kernels run it
        self._layers = [
            DecoderLayer(config, layer, index, is_interleaved=weights.is_interleaved)
            for index, layer in enumerate(weights.layers)
        ]
        # Rounded as whoever trained it did: it was a tensor of the weights' type there.
        self._embed_scale = torch.tensor(config.form.embed_scale, dtype=weights.dtype).item()
        self._ropes = rotary_tables(config, head_dim, device, ropes)
        self._cos_sin = {choice: rope.reaching(0) for choice, rope in self._ropes.items()}
        self._workspace = Workspace.make(
            self._padded, 0, 0, activation_dtype, device, weights.packed_inputs,
            is_interleaved=weights.is_interleaved,
        )  # fmt: skip
        self._scratch: GpuScratch | None = None
        if device.is_gpu:
            shapes = [*matrix_shapes(self._padded), *others]
            self._scratch = GpuScratch(self._padded, shapes, device)

    @property
    def ropes(self) -> Collection[RotaryTable]:
        """Its rotary tables, which other models may share."""
        return self._ropes.values()

    @property
    def has_maxima(self) -> bool:
        """Whether :meth:`launch_head` can leave maxima of its logits: those of the head's product,
        so of no logits that are more."""
        return not changes_logits(self.config.form)

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
        longer = {
            choice: rope.reaching(num_positions)
            for choice, rope in self._ropes.items()
            if min(num_positions, rope.limit) > len(self._cos_sin[choice])
        }
        if longer:
            self._forget_buffers()  # first: an interrupt must not leave launches over what is gone
            self._cos_sin = self._cos_sin | longer
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
        rows: StepRows,
        out: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """Rows of the embedding, as the first layer takes them.

        Args:
            tokens: ``[B * N]`` int32.
            rows: where they stand.
            out: ``[B * N, H]`` of any float type.
            ids: as for ``ops.embed``.
            is_open: likewise.
        """
        table, offset = self.weights.positions, self.config.form.position_offset
        positions = None
        if table is not None and offset is not None:
            positions = ops.EmbedPositions(table, rows.depth, rows.kv_len, offset)
        ops.embed(
            tokens,
            self.weights.embed,
            out,
            ids=ids,
            is_open=is_open,
            scale=self._embed_scale,
            positions=positions,
        )

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
        layer, buffers = self._layers[index], self._buffers
        heads = layer.project(hidden, rows, buffers, is_open)
        append = ops.Append(heads.k, heads.v, rows.depth, self._cos_sin[layer.kind.rope])
        layer.finish(
            heads, hidden, rows.ancestors, rows, cache.layer(index), buffers, out,
            append=append, is_open=is_open,
        )  # fmt: skip

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
        layer = self._layers[index]
        ops.rope_append(
            *layer.project(hidden, rows, self._buffers, is_open), rows.depth, rows.kv_len,
            rows.first_node, rows.num_nodes, rows.block_table, self._cos_sin[layer.kind.rope],
            *cache.layer(index),
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
        layer, buffers = self._layers[index], self._buffers
        heads = layer.heads(rows, buffers)
        layer.finish(
            heads, hidden, rows.ancestors, rows, cache.layer(index), buffers, out, is_open=is_open
        )

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
        ``maxima``, if :attr:`has_maxima`."""
        weights, config = self.weights, self.config
        norm = weights.final_norm, weights.final_norm_bias
        launch_norm(config.form, hidden, *norm, config.rms_norm_eps, feature)
        if logits is not None:
            self.launch_logits(feature, logits, maxima, is_open=is_open)

    def launch_logits(
        self,
        feature: torch.Tensor,
        logits: torch.Tensor,
        maxima: ops.TileMaxima | ops.DraftMaxima | None = None,
        *,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """The rest of :meth:`launch_head`, of ``feature [M, H]``."""
        assert maxima is None or self.has_maxima, "of the product alone"
        head, bias = self.weights.lm_head, self.weights.head_bias
        self.launch_linear(feature, head, bias, out=logits, maxima=maxima, is_open=is_open)
        launch_logit_change(self.config.form, logits)

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
    def _buffers(self) -> LayerBuffers:
        work, scratch = self._workspace, self._scratch
        attention = None if scratch is None else scratch.attention
        return LayerBuffers(work, self._linear_workspace, attention, work.branch)

    @property
    def _linear_workspace(self) -> torch.Tensor:
        return self._workspace.linear if self._scratch is None else self._scratch.linear
