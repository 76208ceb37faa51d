"""The one decoder layer of FSPAD, EAGLE-2 and the ablations, as kernels run it.

A row is a pair: the target's feature f_t and the token behind it, e_{t+1}; it takes position t and
gives a predicted logit row for token t+2 and a regressed feature for f_{t+1} (arXiv 2408.15562,
section 3). H hidden size, I intermediate size, V vocabulary, R rows of the draft head, M rows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial

import torch

from specrt import ops
from specrt.cache import CacheBatch, KVCache
from specrt.config import Form, ModelConfig
from specrt.device import Device
from specrt.draft.fspad.checkpoint import DraftConfig
from specrt.draft.fspad.weights import DraftWeights
from specrt.draft.kind import DraftWindow
from specrt.models.layer import DecoderLayer, LayerBuffers, changes_logits, launch_logit_change
from specrt.models.loader import LayerWeights
from specrt.models.rope import RotaryTable, rotary_table
from specrt.models.step import GpuScratch
from specrt.reuse import power_of_two


@dataclass(frozen=True)
class Rows:
    """Where a step's rows go: B sequences of N rows each (the tables the kernels read)."""

    depth: torch.Tensor
    """``[B, N]`` int32: position less ``kv_len``."""
    kv_len: torch.Tensor
    first_node: torch.Tensor
    num_nodes: torch.Tensor
    block_table: torch.Tensor


@dataclass(frozen=True)
class Activations:
    """Scratch and results of a step of at most M rows, of the layer's activations' dtype; of at
    most L rows there are logits."""

    pair: torch.Tensor
    """``[M, H]``: x, what feature sampling made of the pairs."""
    sampling: torch.Tensor
    """Workspace of ``feature_sample``."""
    qkv: torch.Tensor
    attended: torch.Tensor
    hidden: torch.Tensor
    normed: torch.Tensor
    gate_up: torch.Tensor
    """Before the activation; of no width where one launch gives ``activated``."""
    activated: torch.Tensor
    predicted: torch.Tensor
    """``[M, H]``: p"""
    logits: torch.Tensor
    """``[L, R]`` float32"""
    linear: torch.Tensor | None
    """On the CPU: what ``linear`` makes of rows before packed matrices multiply them."""

    @classmethod
    def make(
        cls,
        layer: ModelConfig,
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
        device: Device,
        packed_inputs: int = 0,
    ) -> Activations:
        """Buffers of ``sizes`` (M, L, R) for a :attr:`DraftLayer.padded`; ``packed_inputs`` are the
        most columns of a packed matrix."""
        rows, logit_rows, head_rows = sizes
        hidden, wide = layer.hidden_size, layer.intermediate_size
        heads = layer.num_heads + 2 * layer.num_kv_heads

        def buffer(num_columns: int) -> torch.Tensor:
            return device.empty(rows, num_columns, dtype=dtype)

        return cls(
            pair=buffer(hidden),
            sampling=buffer(ops.feature_sample_workspace(hidden, wide)),
            qkv=buffer(heads * layer.head_dim),
            attended=buffer(layer.num_heads * layer.head_dim),
            hidden=buffer(hidden),
            normed=buffer(hidden),
            gate_up=buffer(0 if device.is_gpu else 2 * wide),
            activated=buffer(wide),
            predicted=buffer(hidden),
            logits=device.empty(logit_rows, head_rows),
            linear=ops.row_scratch(packed_inputs, rows) if packed_inputs else None,
        )

    def has_room(self, rows: int, logit_rows: int) -> bool:
        """Whether a step of so many rows fits."""
        return rows <= len(self.pair) and logit_rows <= len(self.logits)


class DraftLayer:
    """The layer's steps; each writes into static buffers, so that a graph can run it again.

    Args:
        config: the architecture.
        weights: as :func:`pack_weights` or :func:`fold` gives them.
        device: where the weights are, and how its steps run; None: the CPU.
        ropes: rotary tables of the target, used where the layer's would be the same.
        window: what its attention sees of the committed rows; None: all of them.
        target_form: the target's, whose head this is: logits are scaled and capped as there.
    """

    def __init__(
        self,
        config: DraftConfig,
        weights: DraftWeights,
        device: Device | None = None,
        ropes: Collection[RotaryTable] = (),
        window: DraftWindow | None = None,
        *,
        target_form: Form | None = None,
    ) -> None:
        self.config = config
        self.window = window
        self.weights = weights
        self.device = device or Device()
        head_dim = weights.o.shape[1] // config.layer.num_heads
        self.padded = replace(config.layer, head_dim=head_dim)
        """The layer as the kernels run it: heads may be padded."""
        self.activation_dtype = self.device.activation_dtype(weights.dtype)
        self._target_form = target_form or Form()
        self._layer = DecoderLayer(
            config.layer, _behind_sampling(weights), 0, is_interleaved=weights.is_interleaved
        )
        self._rope = rotary_table(config.layer, head_dim, self.device, ropes)
        self._cos_sin = self._rope.reaching(0)
        self._scratch: GpuScratch | None = None
        if self.device.is_gpu:
            self._scratch = GpuScratch(
                self.padded, map(_shape, weights.matrices.values()), self.device
            )
        self._work = self._activations(0, 0)

    @property
    def has_maxima(self) -> bool:
        """Whether :meth:`finish` can leave maxima of its logits: of those that are the head's
        product."""
        return not changes_logits(self._target_form)

    def activations(self, rows: int, logit_rows: int) -> Activations:
        """Buffers for steps of so many rows, of which some have logits.

        All steps share them, as one runs at a time. Who was given smaller ones before keeps those.
        """
        work = self._work
        if not work.has_room(rows, logit_rows):
            more = power_of_two(max(rows, len(work.pair)))
            self._work = self._activations(more, power_of_two(max(logit_rows, len(work.logits))))
        return self._work

    def _activations(self, rows: int, logit_rows: int) -> Activations:
        sizes = rows, logit_rows, len(self.weights.head)
        packed = [m.shape[1] for m in self.weights.matrices.values() if _is_packed(m)]
        return Activations.make(
            self.padded, sizes, self.activation_dtype, self.device, max(packed, default=0)
        )

    def prepare(self, batch: CacheBatch, num_nodes: int) -> None:
        """Make room for what steps over ``batch`` read beside their operands. Never captured.

        Args:
            batch: the sequences.
            num_nodes: rows of each that attend in one step, at most.
        """
        self.reserve(batch.num_positions)
        if self._scratch is not None:
            num_seen = batch.num_positions
            if self.window is not None:
                num_seen = min(num_seen, self.window.num_seen)
            self._scratch.prepare(len(batch.sequences), num_nodes, num_seen)

    def reserve(self, num_positions: int) -> bool:
        """Make the rotary table long enough; whether it moved.

        Args:
            num_positions: that it is to have.
        """
        if min(num_positions, self._rope.limit) <= len(self._cos_sin):
            return False
        longer = self._rope.reaching(num_positions)
        self.device.forget()  # first: an interrupt must not leave launches over what is gone
        self._cos_sin = longer
        return True

    def sample_features(
        self,
        tokens: torch.Tensor,
        source: torch.Tensor | None,
        features: torch.Tensor,
        work: Activations,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """``work.pair[:M]`` and ``work.qkv[:M]`` of M pairs.

        Args:
            tokens: ``[M]`` int32.
            source: ``[M]`` int32, each pair's row of ``features``; None: its own.
            features: ``[S, H]`` of the activations' dtype.
            work: where to.
            is_open: ``[B]`` int32; if all are 0 nothing is streamed, and what is there means
                nothing. None: there is one.
        """
        w, rows = self.weights, tokens.shape[0]
        pair = work.pair[:rows]
        is_looked_up = w.token_fc is not None and (w.token_gate is not None or w.sample_up is None)
        ops.feature_sample(
            tokens,
            source,
            features,
            None if is_looked_up else w.embed,
            w.fc,
            w.fc_bias,
            w.sample_norm,
            w.sample_gate,
            w.sample_up,
            w.sample_down,
            w.token_fc,
            w.token_gate,
            eps=self.config.layer.rms_norm_eps,
            workspace=work.sampling[:rows],
            linear_workspace=self._linear_workspace(work),
            out=pair,
            is_open=is_open,
        )
        linear = partial(ops.linear, workspace=self._linear_workspace(work), is_open=is_open)
        linear(pair, w.qkv, w.qkv_bias, out=work.qkv[:rows])

    def append(
        self,
        first: int,
        rows: Rows,
        cache: KVCache,
        work: Activations,
        *,
        is_by_pair: bool = False,
    ) -> torch.Tensor:
        """Rotate the queries and append keys and values of B·N rows from row ``first`` on.

        Args:
            first: of their rows in ``work.qkv``.
            rows: where to.
            cache: whose pages.
            work: as :meth:`sample_features` left it.
            is_by_pair: whether the B sequences' rows lie side by side, N times, rather than the N
                rows of each sequence.

        Returns:
            The queries ``[B, N, Hq, d]``, a view of ``work.qkv``.
        """
        layer = self.padded
        size, count = rows.depth.shape
        heads = work.qkv[first : first + size * count]
        outer = (count, size) if is_by_pair else (size, count)
        heads = heads.view(*outer, -1, layer.head_dim)
        if is_by_pair:
            heads = heads.transpose(0, 1)
        q, k, v = heads.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=2)
        queries: torch.Tensor = q
        ops.rope_append(
            q,
            k,
            v,
            rows.depth,
            rows.kv_len,
            rows.first_node,
            rows.num_nodes,
            rows.block_table,
            self._cos_sin,
            *cache.layer(0),
        )
        return queries

    def finish(
        self,
        q: torch.Tensor,
        ancestors: torch.Tensor,
        rows: Rows,
        cache: KVCache,
        work: Activations,
        regressed: torch.Tensor,
        is_open: torch.Tensor | None = None,
        maxima: ops.DraftMaxima | None = None,
    ) -> torch.Tensor:
        """Attention, MLP and head of the first B·N rows of ``work.pair``.

        Args:
            q: ``[B, N, Hq, d]``, as :meth:`append` gives them.
            ancestors: ``[B, N, W]`` int64 bits.
            rows: where their keys and values are.
            cache: of the keys and values.
            work: scratch.
            regressed: ``[B·N, H]``, of the activations' dtype, filled with r.
            is_open: as for :meth:`sample_features`.
            maxima: on a GPU, of the logits, written besides.

        Returns:
            The draft logits ``[B·N, R]``, a view of ``work.logits``.
        """
        w, num = self.weights, rows.depth.numel()
        attention = None if self._scratch is None else self._scratch.attention
        buffers = LayerBuffers(work, self._linear_workspace(work), attention)
        attended = self._layer.attend(
            q,
            ancestors,
            rows,
            cache.layer(0),
            buffers,
            is_open=is_open,
            window=None if self.window is None else self.window.size,
            num_sinks=0 if self.window is None else self.window.num_sinks,
        )
        linear = partial(ops.linear, workspace=buffers.linear, is_open=is_open)
        hidden = work.hidden[:num]
        linear(attended, w.o, residual=work.pair[:num], out=hidden)
        activated = self._layer.activate(hidden, buffers, is_open)
        if w.down_regress is None:
            predicted = regressed
        else:
            predicted = work.predicted[:num]
            linear(activated, w.down_regress, residual=hidden, out=regressed)
        linear(activated, w.down_predict, residual=hidden, out=predicted)
        logits = work.logits[:num]
        linear(predicted, w.head, w.head_bias, out=logits, maxima=maxima)
        launch_logit_change(self._target_form, logits)
        return logits

    def _linear_workspace(self, work: Activations) -> torch.Tensor | None:
        return work.linear if self._scratch is None else self._scratch.linear


def _behind_sampling(weights: DraftWeights) -> LayerWeights:
    """What the layer has of any decoder layer: feature sampling stands for its input's norm."""
    return LayerWeights(
        input_norm=None,
        qkv=weights.qkv,
        qkv_bias=weights.qkv_bias,
        q_norm=None,
        k_norm=None,
        o=weights.o,
        o_bias=None,
        post_norm=weights.post_norm,
        gate_up=weights.gate_up,
        gate_up_bias=None,
        down=weights.down_predict,
        down_bias=None,
    )


def _is_packed(matrix: ops.Matrix) -> bool:
    return isinstance(matrix, ops.PackedMatrix)


def _shape(matrix: ops.Matrix) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]
