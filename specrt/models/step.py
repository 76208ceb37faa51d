"""Buffers of forward passes: what a step reads, at addresses that recorded graphs may keep."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch

from specrt import ops
from specrt.cache import CacheBatch, may_be_reused
from specrt.config import ModelConfig
from specrt.ops.gemm_settings import GemmSettings
from specrt.tree import MAX_NODES, num_words
from specrt.types import DraftTree, VerifyOutput

_CPU = torch.device("cpu")


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


def layers_run(tree: DraftTree) -> int:
    """How many layers the nodes of a tree have been through.

    Raises:
        ValueError: hidden states and their layer do not go together.
    """
    if (tree.hidden is None) != (tree.num_layers_run == 0):
        raise ValueError(
            "tree: expected hidden and num_layers_run > 0 together, got num_layers_run "
            f"{tree.num_layers_run} {'without' if tree.hidden is None else 'with'} hidden"
        )
    return tree.num_layers_run


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
    def make(cls, key: StepKey, output: VerifyOutput, device: torch.device) -> Step:
        """Empty buffers."""

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        words = num_words(MAX_NODES)
        rows = StepRows(
            depth=ints(key.batch, key.num_nodes),
            ancestors=torch.zeros(
                key.batch, key.num_nodes, words, dtype=torch.int64, device=device
            ),
            num_nodes=ints(key.batch),
            first_node=ints(key.batch),
            kv_len=ints(key.batch),
            block_table=ints(key.batch, key.table_width),
        )
        return cls(ints(key.batch, key.num_nodes), rows, output, {})

    def stage(self, tree: DraftTree, batch: CacheBatch, first_node: torch.Tensor | None) -> None:
        """Copy a round's tree and cache tables in."""
        rows, sources = self.rows, self.sources
        _stage(self.tokens, tree.draft_tokens)
        _stage(rows.kv_len, batch.kv_len)
        if sources.get("depth") is not tree.depth:
            _stage(rows.depth, tree.depth)
        if sources.get("ancestors") is not tree.ancestors:
            _stage(rows.ancestors[..., : tree.ancestors.shape[-1]], tree.ancestors)
        if sources.get("num_nodes") is not tree.num_nodes:
            _stage(rows.num_nodes, tree.num_nodes)
        if sources.get("block_table") is not batch.block_table:
            _stage(rows.block_table, batch.block_table)
        if first_node is not None:
            _stage(rows.first_node, first_node)
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


def _stage(there: torch.Tensor, source: torch.Tensor) -> None:
    there.copy_(may_be_reused(source, there.device), non_blocking=True)


def on_host(output: VerifyOutput) -> VerifyOutput:
    """A copy of ``output`` in float32 on the host, where trees are accepted and drafted today.

    From a GPU this waits for the pass and moves ``4 B N V`` bytes of logits: 31 MB and some 0.6 ms
    for 60 nodes of a vocabulary of 128k over PCIe 5. It goes when acceptance runs on the device.
    """
    taps = {name: _fetch(tap) for name, tap in output.taps.items()}
    copy = VerifyOutput(_fetch(output.logits), MappingProxyType(taps))
    if output.logits.is_cuda and (taps or copy.logits.numel()):
        torch.cuda.current_stream(output.logits.device).synchronize()
    return copy


def _fetch(source: torch.Tensor) -> torch.Tensor:
    # Pinned memory is kept by torch and handed out again; pageable would be copied twice.
    there = torch.empty(source.shape, dtype=torch.float32, pin_memory=source.is_cuda)
    return there.copy_(source, non_blocking=True)


class GpuScratch:
    """What kernels on a GPU want beside their operands; launches share it one after another.

    Args:
        config: the model's.
        dtype: of its activations.
        device: where to; the memory there stays at its place unless attention needs more.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._settings = GemmSettings.current(dtype)
        self._config = config
        self._device = device
        q_rows = config.num_heads * config.head_dim
        qkv_rows = q_rows + 2 * config.num_kv_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        most_outputs = max(qkv_rows, hidden, 2 * inner, config.vocab_size)
        size = ops.linear_workspace(most_outputs, max(q_rows, hidden, inner))
        self.linear = torch.empty(size, dtype=torch.uint8, device=device)
        """A workspace of ``linear`` for every matrix of the model."""
        self.attention = torch.zeros(0, device=device)
        """A workspace of ``tree_attention`` for the largest step that came up."""

    def prepare(self, key: StepKey, page_size: int) -> bool:
        """Make room for a step's attention.

        Returns:
            Whether its workspace has moved, so that recorded steps are stale.

        Raises:
            ValueError: a setting of torch's has changed, and a row's bits with it.
        """
        self._settings.require_unchanged()
        config = self._config
        size = ops.tree_attention_workspace(
            key.batch,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            key.num_nodes,
            key.table_width * page_size,
            self._device,
        )
        if size <= self.attention.numel():
            return False
        self.attention = torch.zeros(size, device=self._device)
        return True


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
    """float32, whatever the activations are."""

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        rows: int,
        logit_rows: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device = _CPU,
    ) -> Workspace:
        """Buffers for ``rows`` rows of ``dtype``, ``logit_rows`` of them with logits."""
        heads = config.num_heads + 2 * config.num_kv_heads

        def wide(num_columns: int) -> torch.Tensor:
            return torch.empty(rows, num_columns, dtype=dtype, device=device)

        return cls(
            rows=rows,
            hidden=wide(config.hidden_size),
            normed=wide(config.hidden_size),
            qkv=wide(heads * config.head_dim),
            attended=wide(config.num_heads * config.head_dim),
            gate_up=wide(2 * config.intermediate_size),
            activated=wide(config.intermediate_size),
            feature=wide(config.hidden_size),
            logits=torch.empty(logit_rows, config.vocab_size, device=device),
        )
