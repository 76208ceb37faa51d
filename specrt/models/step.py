"""Buffers of forward passes: what a step reads, at addresses that recorded graphs may keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specrt.cache import CacheBatch
from specrt.config import ModelConfig
from specrt.tree import MAX_NODES, num_words
from specrt.types import DraftTree, VerifyOutput


@dataclass(frozen=True)
class StepKey:
    """What tells steps apart: equal keys mean the same launches on the same buffers."""

    batch: int
    num_nodes: int
    table_width: int
    has_logits: bool
    taps: tuple[str, ...]
    first_layer: int
    """The layer it starts at; above 0 it starts from hidden states, not from tokens."""


@dataclass(frozen=True)
class StepRows:
    """Where rows stand and what they see: B sequences of N rows each (what the kernels read)."""

    depth: torch.Tensor
    """``[B, N]`` int32: position less ``kv_len``."""
    ancestors: torch.Tensor
    """``[B, N, W]`` int64 bits."""
    num_nodes: torch.Tensor
    """``[B]`` int32: rows that count."""
    first_node: torch.Tensor
    """``[B]`` int32: the tree node that the first row is."""
    kv_len: torch.Tensor
    """``[B]`` int32"""
    block_table: torch.Tensor
    """``[B, max_pages]`` int32"""


@dataclass(eq=False)
class Step:
    """Static copies of what a step reads."""

    tokens: torch.Tensor
    rows: StepRows
    output: VerifyOutput
    sources: dict[str, torch.Tensor | None]
    """What was copied last: shapes of chains and page tables are shared objects that are never
    written, so most copies of plain decoding need not be made again."""

    @classmethod
    def make(cls, key: StepKey, output: VerifyOutput) -> Step:
        """Empty buffers."""

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        words = num_words(MAX_NODES)
        rows = StepRows(
            depth=ints(key.batch, key.num_nodes),
            ancestors=torch.zeros(key.batch, key.num_nodes, words, dtype=torch.int64),
            num_nodes=ints(key.batch),
            first_node=ints(key.batch),
            kv_len=ints(key.batch),
            block_table=ints(key.batch, key.table_width),
        )
        return cls(ints(key.batch, key.num_nodes), rows, output, {})

    def stage(self, tree: DraftTree, batch: CacheBatch, first_node: torch.Tensor | None) -> None:
        """Copy a round's tree and cache tables in."""
        self.tokens.copy_(tree.draft_tokens)
        rows, sources = self.rows, self.sources
        rows.kv_len.copy_(batch.kv_len)
        if sources.get("depth") is not tree.depth:
            rows.depth.copy_(tree.depth)
        if sources.get("ancestors") is not tree.ancestors:
            rows.ancestors[..., : tree.ancestors.shape[-1]].copy_(tree.ancestors)
        if sources.get("num_nodes") is not tree.num_nodes:
            rows.num_nodes.copy_(tree.num_nodes)
        if sources.get("block_table") is not batch.block_table:
            rows.block_table.copy_(batch.block_table)
        if first_node is not None:
            rows.first_node.copy_(first_node)
        elif sources.get("first_node") is not None:
            rows.first_node.zero_()
        # Kept alive here, so that another tensor cannot take the same identity.
        self.sources = {
            "depth": tree.depth,
            "ancestors": tree.ancestors,
            "num_nodes": tree.num_nodes,
            "block_table": batch.block_table,
            "first_node": first_node,
        }


@dataclass(frozen=True)
class Workspace:
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
    def make(cls, config: ModelConfig, rows: int, logit_rows: int) -> Workspace:
        """Buffers for ``rows`` rows, ``logit_rows`` of them with logits."""
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
