"""The Llama family (Llama 2/3, Vicuna, CodeLlama, Mistral, Qwen2, Qwen3) over trees of tokens.

One forward pass serves decoding, verification and prefill: a lone token is a tree of one node, a
piece of a prompt is a chain. Every op on the way is row-invariant, so a node's logits are those of
decoding it alone, to the bit.

Activations are float32; weights and cache keep the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from specrt import ops
from specrt.cache import CacheBatch, KVCache
from specrt.config import ModelConfig
from specrt.models.loader import LayerWeights, Weights
from specrt.models.rope import rope_table
from specrt.tree import MAX_NODES, chain, num_words
from specrt.types import DraftTree, VerifyOutput

StepRunner = Callable[[Hashable, Callable[[], None]], None]
"""Runs a step named by a key: at once, or by replaying what it launched before."""

_MAX_STEPS = 1024  # of different sizes; beyond, all are forgotten and made again as they come up

FINAL_TAP = "final"
"""The feature: the last hidden state after the final norm, what the LM head multiplies."""


def run_eagerly(key: Hashable, launch: Callable[[], None]) -> None:
    """The :data:`StepRunner` that records nothing."""
    launch()


def layer_tap(layer: int) -> str:
    """The tap that gives the output of layer ``layer`` (counted from 0)."""
    return f"layer.{layer}"


@dataclass(frozen=True)
class _StepKey:
    batch: int
    num_nodes: int
    table_width: int
    has_logits: bool
    taps: tuple[str, ...]


@dataclass(eq=False)
class _Step:
    """Static copies of what a step reads, at addresses a recorded graph may keep."""

    tokens: torch.Tensor
    depth: torch.Tensor
    ancestors: torch.Tensor
    num_nodes: torch.Tensor
    first_node: torch.Tensor
    kv_len: torch.Tensor
    block_table: torch.Tensor
    output: VerifyOutput
    sources: dict[str, torch.Tensor | None]
    """What was copied last: shapes of chains and page tables are shared objects that are never
    written, so most copies of plain decoding need not be made again."""

    @classmethod
    def make(cls, key: _StepKey, output: VerifyOutput) -> _Step:
        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        words = num_words(MAX_NODES)
        return cls(
            tokens=ints(key.batch, key.num_nodes),
            depth=ints(key.batch, key.num_nodes),
            ancestors=torch.zeros(key.batch, key.num_nodes, words, dtype=torch.int64),
            num_nodes=ints(key.batch),
            first_node=ints(key.batch),
            kv_len=ints(key.batch),
            block_table=ints(key.batch, key.table_width),
            output=output,
            sources={},
        )

    def stage(self, tree: DraftTree, batch: CacheBatch, first_node: torch.Tensor | None) -> None:
        """Copy a round's tree and cache tables in."""
        self.tokens.copy_(tree.draft_tokens)
        self.kv_len.copy_(batch.kv_len)
        sources = self.sources
        if sources.get("depth") is not tree.depth:
            self.depth.copy_(tree.depth)
        if sources.get("ancestors") is not tree.ancestors:
            self.ancestors[..., : tree.ancestors.shape[-1]].copy_(tree.ancestors)
        if sources.get("num_nodes") is not tree.num_nodes:
            self.num_nodes.copy_(tree.num_nodes)
        if sources.get("block_table") is not batch.block_table:
            self.block_table.copy_(batch.block_table)
        if first_node is not None:
            self.first_node.copy_(first_node)
        elif sources.get("first_node") is not None:
            self.first_node.zero_()
        # Kept alive here, so that another tensor cannot take the same identity.
        self.sources = {
            "depth": tree.depth,
            "ancestors": tree.ancestors,
            "num_nodes": tree.num_nodes,
            "block_table": batch.block_table,
            "first_node": first_node,
        }


@dataclass(frozen=True)
class _Workspace:
    """Activations of up to ``rows`` rows, shared by all steps (which run one at a time)."""

    rows: int
    hidden: torch.Tensor
    normed: torch.Tensor
    qkv: torch.Tensor
    attended: torch.Tensor
    gate_up: torch.Tensor
    activated: torch.Tensor
    feature: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def make(cls, config: ModelConfig, rows: int, logit_rows: int) -> _Workspace:
        heads = config.num_heads + 2 * config.num_kv_heads
        return cls(
            rows=rows,
            hidden=torch.empty(rows, config.hidden_size),
            normed=torch.empty(rows, config.hidden_size),
            qkv=torch.empty(rows, heads * config.head_dim),
            attended=torch.empty(rows, config.num_heads * config.head_dim),
            gate_up=torch.empty(rows, 2 * config.intermediate_size),
            activated=torch.empty(rows, config.intermediate_size),
            feature=torch.empty(rows, config.hidden_size),
            logits=torch.empty(logit_rows, config.vocab_size),
        )


class LlamaModel:
    """A target (or a small drafting model): weights, rotary table and reusable buffers.

    Args:
        config: the architecture.
        weights: as :func:`specrt.models.loader.load_weights` gives them.
        run_step: how steps run; the engine hands its graph cache here.
        on_move: called when buffers move, so that recorded graphs are dropped.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        run_step: StepRunner = run_eagerly,
        on_move: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.dtype = weights.embed.dtype
        self._run_step = run_step
        self._on_move = on_move
        # Nodes of a tree at the context limit may lie past it; they are never accepted.
        self._rope = rope_table(
            config.head_dim,
            config.rope_theta,
            config.max_positions + MAX_NODES,
            config.rope_scaling,
        )
        self._workspace = _Workspace.make(config, 0, 0)
        self._steps: dict[_StepKey, _Step] = {}
        self._tap_buffers: dict[str, torch.Tensor] = {}

    def new_cache(self, page_size: int = 64) -> KVCache:
        """An empty cache of this model's shape and dtype."""
        return KVCache(self.config, self.dtype, page_size, on_move=self._forget_buffers)

    def forward(
        self,
        tree: DraftTree,
        batch: CacheBatch,
        *,
        taps: tuple[str, ...] = (),
        has_logits: bool = True,
        first_node: torch.Tensor | None = None,
    ) -> VerifyOutput:
        """Run every node of the trees; write their keys and values past each ``kv_len``.

        Args:
            tree: B trees of N nodes; only tokens, depth, ancestors and num_nodes are read.
            batch: the B sequences the trees continue.
            taps: hidden states to return: ``"final"`` or :func:`layer_tap` names.
            has_logits: False skips the LM head (prefill); logits are then ``[B, 0, V]``.
            first_node: ``[B]`` int32; the given nodes are those from this index on of a larger
                tree whose earlier nodes were run before (their rows still lie past ``kv_len``).

        Returns:
            Logits ``[B, N, V]`` and taps ``[B, N, H]``, valid until the next call.

        Raises:
            ValueError: more than 128 nodes, or an unknown tap.
        """
        size, num_nodes = tree.draft_tokens.shape
        if num_nodes > MAX_NODES:
            raise ValueError(f"tree: expected at most {MAX_NODES} nodes, got {num_nodes}")
        key = _StepKey(size, num_nodes, batch.block_table.shape[1], has_logits, taps)
        self._ensure_buffers(key)
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= _MAX_STEPS:
                self._forget_buffers()
            step = self._steps[key] = _Step.make(key, self._output(key))
        step.stage(tree, batch, first_node)
        self._embed(step.tokens, self._workspace.hidden[: size * num_nodes])
        # A graph holds this model's and this cache's addresses; as part of its key they outlive it.
        self._run_step((self, batch.cache, key), lambda: self._launch(key, step, batch.cache))
        return step.output

    def extend(
        self, ids: Sequence[int], batch: CacheBatch, taps: tuple[str, ...] = ()
    ) -> Iterator[tuple[int, Mapping[str, torch.Tensor]]]:
        """Run known tokens of one sequence and commit them, piece by piece (prefill).

        Args:
            ids: the tokens that follow what ``batch``, of one sequence, holds.
            batch: their cache.
            taps: as for :meth:`forward`.

        Yields:
            The index in ``ids`` where a piece starts and its taps ``[1, n, H]``.
        """
        tokens = torch.tensor([list(ids)], dtype=torch.int32)
        for start in range(0, tokens.shape[1], MAX_NODES):
            tree = chain(tokens[:, start : start + MAX_NODES])
            output = self.forward(tree, batch, taps=taps, has_logits=False)
            path = torch.arange(tree.draft_tokens.shape[1], dtype=torch.int32)[None]
            batch.commit(path, tree.num_nodes)
            yield start, output.taps

    # --- buffers ------------------------------------------------------------------------------

    def _ensure_buffers(self, key: _StepKey) -> None:
        rows = key.batch * key.num_nodes
        logit_rows = rows if key.has_logits else 0
        work = self._workspace
        if rows > work.rows or logit_rows > work.logits.shape[0]:
            rows = max(rows, work.rows)
            logit_rows = max(logit_rows, work.logits.shape[0])
            self._workspace = _Workspace.make(self.config, rows, logit_rows)
            self._tap_buffers.clear()
            self._forget_buffers()
        for tap in key.taps:
            if tap != FINAL_TAP and tap not in self._tap_buffers:
                self._tap_buffers[self._checked_tap(tap)] = torch.empty_like(self._workspace.hidden)

    def _checked_tap(self, tap: str) -> str:
        layers = self.config.num_layers
        if tap not in {layer_tap(i) for i in range(layers)}:
            raise ValueError(
                f"taps: expected 'final' or 'layer.0' .. 'layer.{layers - 1}', got {tap!r}"
            )
        return tap

    def _forget_buffers(self) -> None:
        self._steps.clear()
        self._on_move()

    def _embed(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        embed = self.weights.embed
        if embed.dtype == torch.float32:
            torch.index_select(embed, 0, tokens.view(-1), out=out)
        else:
            out.copy_(embed.index_select(0, tokens.view(-1)))

    def _output(self, key: _StepKey) -> VerifyOutput:
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

    # --- the pass -----------------------------------------------------------------------------

    def _launch(self, key: _StepKey, step: _Step, cache: KVCache) -> None:
        rows = key.batch * key.num_nodes
        work = self._workspace
        hidden = between = work.hidden[:rows]
        for index, layer in enumerate(self.weights.layers):
            # A tapped layer's output is read by the next layer where it lies, never written.
            is_tapped = layer_tap(index) in key.taps
            out = self._tap_buffers[layer_tap(index)][:rows] if is_tapped else between
            self._attention(layer, index, hidden, between, step, cache)
            self._mlp(layer, between, out)
            hidden = out
        if key.has_logits or FINAL_TAP in key.taps:
            feature = work.feature[:rows]
            ops.rms_norm(hidden, self.weights.final_norm, self.config.rms_norm_eps, out=feature)
            if key.has_logits:
                ops.linear(feature, self.weights.lm_head, out=work.logits[:rows])

    def _attention(
        self,
        layer: LayerWeights,
        index: int,
        hidden: torch.Tensor,
        out: torch.Tensor,
        step: _Step,
        cache: KVCache,
    ) -> None:
        """``out = hidden + O(attention(norm(hidden)))``; the keys and values are appended."""
        config, rows = self.config, hidden.shape[0]
        size, num_nodes = step.tokens.shape
        normed, qkv = self._workspace.normed[:rows], self._workspace.qkv[:rows]
        attended = self._workspace.attended[:rows]
        ops.rms_norm(hidden, layer.input_norm, config.rms_norm_eps, out=normed)
        ops.linear(normed, layer.qkv, layer.qkv_bias, out=qkv)
        heads = qkv.view(size, num_nodes, -1, config.head_dim)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=2)
        for part, norm in ((q, layer.q_norm), (k, layer.k_norm)):
            if norm is not None:
                flat = part.view(rows, -1, config.head_dim)
                ops.rms_norm(flat, norm, config.rms_norm_eps, out=flat)
        key_cache, value_cache = cache.layer(index)
        ops.rope_append(
            q,
            k,
            v,
            step.depth,
            step.kv_len,
            step.first_node,
            step.num_nodes,
            step.block_table,
            self._rope,
            key_cache,
            value_cache,
        )
        ops.tree_attention(
            q,
            key_cache,
            value_cache,
            step.block_table,
            step.kv_len,
            step.first_node,
            step.num_nodes,
            step.ancestors,
            config.head_dim**-0.5,
            out=attended.view(size, num_nodes, config.num_heads, config.head_dim),
        )
        ops.linear(attended, layer.o, layer.o_bias, residual=hidden, out=out)

    def _mlp(self, layer: LayerWeights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """``out = hidden + down(silu(gate) * up)`` of ``norm(hidden)``."""
        work, rows = self._workspace, hidden.shape[0]
        normed, gate_up = work.normed[:rows], work.gate_up[:rows]
        activated = work.activated[:rows]
        ops.rms_norm(hidden, layer.post_norm, self.config.rms_norm_eps, out=normed)
        ops.linear(normed, layer.gate_up, layer.gate_up_bias, out=gate_up)
        ops.silu_mul(gate_up, out=activated)
        ops.linear(activated, layer.down, layer.down_bias, residual=hidden, out=out)
