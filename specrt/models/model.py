"""The Llama family (Llama 2/3, Vicuna, CodeLlama, Mistral, Qwen2, Qwen3) over trees of tokens.

One forward pass serves decoding, verification and prefill: a lone token is a tree of one node, a
piece of a prompt is a chain. Every op on the way is row-invariant, so a node's logits are those of
decoding it alone, to the bit.

Weights and cache keep the model's dtype. Activations, and the taps among them, are float32 on the
CPU and of the weights' dtype on a GPU, where kernels compute in float32 and round each result once;
logits are float32. Both stay where the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple
from weakref import WeakSet

import torch

from specrt import ops
from specrt.cache import CacheBatch, KVCache
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.models.fair_lock import FairLock
from specrt.models.gate_up import launch_gated
from specrt.models.heads import norm_eps
from specrt.models.layer_run import LowerLayers
from specrt.models.layouts import matrix_shapes
from specrt.models.loader import LayerWeights, Weights
from specrt.models.placement import check_placed
from specrt.models.rope import RotaryTable, rotary_table
from specrt.models.step import (
    FINAL_TAP,
    GpuScratch,
    Step,
    StepKey,
    StepRows,
    Workspace,
    check_tap,
    layer_tap,
    with_logits_tap,
)
from specrt.reuse import Recent
from specrt.tree import MAX_NODES, ChainTrees
from specrt.types import DraftTree, VerifyOutput

_MAX_STEPS = 1024  # whose buffers are kept: those of the sizes that came up last


class Heads(NamedTuple):
    """A layer's queries, keys and values, views of one buffer: ``[B, N, heads, d]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class BoundPass(NamedTuple):
    """A forward pass over given tensors."""

    output: VerifyOutput
    """What a launch writes."""
    launch: Callable[[], None]
    """Nothing but ops on buffers that stay."""


class LlamaModel:
    """A target (or a small drafting model): weights, rotary table and reusable buffers.

    Args:
        config: the architecture.
        weights: as :func:`specrt.models.loader.load_weights` gives them, heads padded or not.
        device: where the weights are, and how its steps run; None: there, by itself. Its drafter
            runs on the same one.
        activation_dtype: of the buffers between the kernels; None: float32 on the CPU, the
            weights' dtype on a GPU.
        rope: the rotary table of another model, used where this one's would be the same.
        others: shapes of further matrices that :meth:`launch_linear` multiplies by.

    Raises:
        ValueError: the weights do not lie as the device takes them.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        device: Device | None = None,
        *,
        activation_dtype: torch.dtype | None = None,
        rope: RotaryTable | None = None,
        others: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.config = config
        self.weights = weights
        head_dim = weights.layers[0].o.shape[1] // config.num_heads
        self._padded = replace(config, head_dim=head_dim)  # as the kernels run it
        self._head_eps = norm_eps(config.rms_norm_eps, config.head_dim, head_dim)
        self.dtype = weights.embed.dtype
        self.device = device or Device(weights.embed.device)
        check_placed(weights, self.device)
        self.activation_dtype = activation_dtype or self.device.activation_dtype(self.dtype)
        self.rope = rotary_table(config, head_dim, self.device, rope)
        self._cos_sin = self.rope.reaching(0)
        self._workspace = Workspace.make(self._padded, 0, 0, self.activation_dtype, self.device)
        self._scratch: GpuScratch | None = None
        if self.device.is_gpu:
            shapes = [*matrix_shapes(self._padded), *others]
            self._scratch = GpuScratch(self._padded, shapes, self.device)
        self._steps: Recent[StepKey, Step] = Recent(_MAX_STEPS)
        self._tap_buffers: dict[str, torch.Tensor] = {}
        self._caches: WeakSet[KVCache] = WeakSet()
        self._chains = ChainTrees(self.device)
        self.lock = FairLock()  # who has it may use the buffers, and what `forward` gave

    def new_cache(self, page_size: int = 64, max_pages: int | None = None) -> KVCache:
        """An empty cache of this model's shape and dtype; arguments as of :class:`KVCache`."""
        cache = KVCache(
            self._padded, self.dtype, page_size, device=self.device, max_pages=max_pages
        )
        self._caches.add(cache)
        return cache

    def owns(self, cache: KVCache) -> bool:
        """Whether :meth:`new_cache` of this very model made ``cache``."""
        return cache in self._caches

    def forward(
        self,
        tree: DraftTree,
        batch: CacheBatch,
        *,
        taps: tuple[str, ...] = (),
        has_logits: bool = True,
        first_node: torch.Tensor | None = None,
        lower: LowerLayers | None = None,
    ) -> VerifyOutput:
        """Run every node of the trees; write their keys and values past each ``kv_len``.

        Args:
            tree: B trees of N nodes, on the model's device; tokens, depth, ancestors and num_nodes
                are read.
            batch: the B sequences the trees continue.
            taps: hidden states to return: ``"final"``, :func:`layer_tap` names, ``"logits"``.
            has_logits: False skips the LM head (prefill); logits are then ``[B, 0, V]``.
            first_node: ``[B]`` int32; the given nodes are those from this index on of a larger
                tree whose earlier nodes were run before (their rows still lie past ``kv_len``).
            lower: what the drafter was lent: layers that it ran for this very tree are left out.

        Returns:
            Logits ``[B, N, V]`` float32 and taps ``[B, N, H]`` of the activations' dtype, valid
            until the next call.

        Raises:
            ValueError: more than 128 nodes or an unknown tap.
        """
        num_nodes = tree.draft_tokens.shape[1]
        if num_nodes > MAX_NODES:
            raise ValueError(f"tree: expected at most {MAX_NODES} nodes, got {num_nodes}")
        run = None if lower is None or first_node is not None else lower.take(tree, batch, taps)
        first = 0 if run is None else run.shape.num_layers
        key = StepKey.of(tree, batch.block_table.shape[1], has_logits, taps, first)
        self._ensure_buffers(key, batch.num_positions)
        step = self._steps.get(key)
        if step is None:
            step = self._steps.put(key, Step(key, self._output(key), self.device))
        step.stage(tree, batch, first_node)
        start = self._start(key)
        if run is None:
            self.embed_tokens(step.tokens.view(-1), start)
        else:
            run.copy_states(num_nodes, start)
        # A graph holds addresses of all of these; as part of its key they outlive it.
        steps = self, batch.cache, step
        self.device.run(steps, lambda: self._launch(key, step.rows, batch.cache))
        return with_logits_tap(step.output, taps)

    def bind(self, tree: DraftTree, batch: CacheBatch, *, taps: tuple[str, ...] = ()) -> BoundPass:
        """A pass of :meth:`forward` that reads these very tensors each time it is launched.

        It stands until the device's steps go stale (:attr:`Device.version`), or the batch's tables
        move.

        Args:
            tree: B trees of N nodes; what it holds may change between launches.
            batch: likewise.
            taps: as for :meth:`forward`.

        Raises:
            ValueError: as :meth:`forward`.
        """
        key = StepKey.of(tree, batch.block_table.shape[1], True, taps, first_layer=0)
        self._ensure_buffers(key, batch.num_positions)
        rows = StepRows(
            depth=tree.depth,
            ancestors=tree.ancestors,
            num_nodes=tree.num_nodes,
            first_node=self.device.zeros(key.batch, dtype=torch.int32),
            kv_len=batch.kv_len,
            block_table=batch.block_table,
        )

        def launch() -> None:
            self.embed_tokens(tree.draft_tokens.view(-1), self._start(key))
            self._launch(key, rows, batch.cache)

        return BoundPass(with_logits_tap(self._output(key), taps), launch)

    def extend(
        self, ids: Sequence[int], batch: CacheBatch, taps: tuple[str, ...] = ()
    ) -> Iterator[tuple[int, Mapping[str, torch.Tensor]]]:
        """Run known tokens of one sequence and commit them, piece by piece (prefill).

        Args:
            ids: the tokens that follow what ``batch``, of one sequence, holds; a prompt may come
                in any number of calls, to the same bits.
            batch: their cache, with pages for them.
            taps: as for :meth:`forward`.

        Yields:
            The index in ``ids`` where a piece starts and its taps ``[1, n, H]``.
        """
        tokens = self.device.there(torch.tensor([list(ids)], dtype=torch.int32))
        for start in range(0, tokens.shape[1], MAX_NODES):
            tree = self._chains.of(tokens[:, start : start + MAX_NODES])
            output = self.forward(tree, batch, taps=taps, has_logits=False)
            batch.move(tree.depth, tree.num_nodes)  # a chain's node i has depth i
            batch.advance([tree.draft_tokens.shape[1]])
            yield start, output.taps

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
            self._tap_buffers.clear()
            self._workspace = work
        if self._scratch is not None:
            self._scratch.prepare(batch, num_nodes, num_positions)

    def _ensure_buffers(self, key: StepKey, num_positions: int) -> None:
        self.reserve(key.batch, key.num_nodes, num_positions, has_logits=key.has_logits)
        for tap in key.taps:
            if tap == FINAL_TAP or tap in self._tap_buffers:
                continue
            check_tap(tap, self.config.num_layers)
            self._tap_buffers[tap] = torch.empty_like(self._workspace.hidden)

    def _forget_buffers(self) -> None:
        self._steps.clear()
        self.device.forget()

    def _start(self, key: StepKey) -> torch.Tensor:
        """Where the first layer's input goes: a tap's buffer if that very state is tapped."""
        rows = key.batch * key.num_nodes
        if key.first_layer and layer_tap(key.first_layer - 1) in key.taps:
            return self._tap_buffers[layer_tap(key.first_layer - 1)][:rows]
        return self._workspace.hidden[:rows]

    def _output(self, key: StepKey) -> VerifyOutput:
        rows = key.batch * key.num_nodes
        work, shape = self._workspace, (key.batch, key.num_nodes, -1)
        taps = {
            tap: (work.feature if tap == FINAL_TAP else self._tap_buffers[tap])[:rows].view(shape)
            for tap in key.taps
        }
        if key.has_logits:
            logits = work.logits[:rows].view(shape)
        else:
            logits = work.logits.new_empty(key.batch, 0, self.config.vocab_size)
        return VerifyOutput(logits, MappingProxyType(taps))

    # --- launches: on buffers that :meth:`reserve` has made, so that a graph may hold them ----

    def embed_tokens(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        """Rows of the embedding: ``tokens [M]`` int32 into ``out [M, H]`` of any float type."""
        ops.embed(tokens, self.weights.embed, out)

    def launch_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        rows: StepRows,
        cache: KVCache,
        out: torch.Tensor,
    ) -> None:
        """One decoder layer over B·N rows; its keys and values are appended.

        Args:
            index: which layer.
            hidden: ``[B * N, H]`` of the activations' dtype, read; the workspace's own rows may be
                overwritten.
            rows: where they stand.
            cache: this model's.
            out: ``[B * N, H]``, written.
        """
        layer, between = self.weights.layers[index], self._workspace.hidden[: hidden.shape[0]]
        heads = self._project(layer, hidden, rows)
        self._attention(layer, index, (heads, hidden), between, rows, cache)
        self._mlp(layer, between, out)

    def launch_kv(self, index: int, hidden: torch.Tensor, rows: StepRows, cache: KVCache) -> None:
        """Append a layer's keys and values of ``hidden [B * N, H]``, and nothing more."""
        heads = self._project(self.weights.layers[index], hidden, rows)
        ops.rope_append(
            heads.q,
            heads.k,
            heads.v,
            rows.depth,
            rows.kv_len,
            rows.first_node,
            rows.num_nodes,
            rows.block_table,
            self._cos_sin,
            *cache.layer(index),
        )

    def launch_head(
        self, hidden: torch.Tensor, feature: torch.Tensor, logits: torch.Tensor | None
    ) -> None:
        """Final norm of ``hidden [M, H]`` into ``feature``, and its ``logits [M, V]``."""
        ops.rms_norm(hidden, self.weights.final_norm, self.config.rms_norm_eps, out=feature)
        if logits is not None:
            self.launch_linear(feature, self.weights.lm_head, out=logits)

    def _launch(self, key: StepKey, rows: StepRows, cache: KVCache) -> None:
        count = key.batch * key.num_nodes
        work = self._workspace
        hidden = self._start(key)
        for index in range(key.first_layer, self.config.num_layers):
            # A tapped layer's output is read by the next layer where it lies, never written.
            is_tapped = layer_tap(index) in key.taps
            out = (self._tap_buffers[layer_tap(index)] if is_tapped else work.hidden)[:count]
            self.launch_layer(index, hidden, rows, cache, out)
            hidden = out
        if key.has_logits or FINAL_TAP in key.taps:
            logits = work.logits[:count] if key.has_logits else None
            self.launch_head(hidden, work.feature[:count], logits)

    def _project(self, layer: LayerWeights, hidden: torch.Tensor, rows: StepRows) -> Heads:
        """Of ``norm(hidden)``; not rotated yet."""
        config, count = self.config, hidden.shape[0]
        normed, qkv = self._workspace.normed[:count], self._workspace.qkv[:count]
        ops.rms_norm(hidden, layer.input_norm, config.rms_norm_eps, out=normed)
        self.launch_linear(normed, layer.qkv, layer.qkv_bias, out=qkv)
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        heads = Heads(*qkv.view(*rows.depth.shape, sum(sizes), -1).split(sizes, dim=2))
        for part, norm in ((heads.q, layer.q_norm), (heads.k, layer.k_norm)):
            if norm is not None:
                flat = part.view(count, -1, self._padded.head_dim)
                ops.rms_norm(flat, norm, self._head_eps, out=flat)
        return heads

    def _attention(
        self,
        layer: LayerWeights,
        index: int,
        inputs: tuple[Heads, torch.Tensor],
        out: torch.Tensor,
        rows: StepRows,
        cache: KVCache,
    ) -> None:
        """``out = hidden + O(attention(heads))`` for ``inputs`` = (heads, hidden)."""
        config, (heads, hidden) = self.config, inputs
        attended = self._workspace.attended[: hidden.shape[0]]
        ops.tree_attention(
            heads.q,
            *cache.layer(index),
            rows.block_table,
            rows.kv_len,
            rows.first_node,
            rows.num_nodes,
            rows.ancestors,
            config.head_dim**-0.5,
            out=attended.view(*rows.depth.shape, config.num_heads, -1),
            workspace=None if self._scratch is None else self._scratch.attention,
            append=ops.Append(heads.k, heads.v, rows.depth, self._cos_sin),
        )
        self.launch_linear(attended, layer.o, layer.o_bias, hidden, out=out)

    def _mlp(self, layer: LayerWeights, hidden: torch.Tensor, out: torch.Tensor) -> None:
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
            None if self._scratch is None else self._scratch.linear,
            is_interleaved=self.weights.is_interleaved,
        )
        self.launch_linear(activated, layer.down, layer.down_bias, hidden, out=out)

    def launch_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        *,
        out: torch.Tensor,
    ) -> None:
        """``ops.linear`` by one of this model's matrices, or of the others that it was told of."""
        workspace = None if self._scratch is None else self._scratch.linear
        ops.linear(x, weight, bias, residual, out, workspace)
