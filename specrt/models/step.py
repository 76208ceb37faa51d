"""Buffers of forward passes: what a step reads, at addresses that captured graphs may keep."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch

from specrt import ops
from specrt.cache import CacheBatch, may_be_reused
from specrt.config import ModelConfig
from specrt.ops.gemm_settings import GemmSettings
from specrt.reuse import power_of_two
from specrt.tree import MAX_NODES, num_words
from specrt.types import DraftTree, VerifyOutput

_CPU = torch.device("cpu")
_FEW_ROWS = 16  # that a workspace has room for at least

FINAL_TAP = "final"
"""The feature: the last hidden state after the final norm, what the LM head multiplies."""
LOGITS_TAP = "logits"
"""The tap that gives the logits, ``[B, N, V]``; of a pass that makes none it gives nothing."""


def layer_tap(layer: int) -> str:
    """The tap that gives the output of layer ``layer`` (counted from 0)."""
    return f"layer.{layer}"


def check_tap(tap: str, num_layers: int) -> None:
    """Whether a model of so many layers has a tap.

    Raises:
        ValueError: it has none of this name.
    """
    if tap not in (FINAL_TAP, LOGITS_TAP, *map(layer_tap, range(num_layers))):
        last = layer_tap(num_layers - 1)
        raise ValueError(f"taps: expected 'final', 'logits' or 'layer.0' .. '{last}', got {tap!r}")


class StepKey(NamedTuple):
    """What tells steps apart: equal keys mean the same launches on the same buffers."""

    batch: int
    num_nodes: int
    table_width: int
    has_logits: bool
    taps: tuple[str, ...]
    first_layer: int
    """The layer it starts at; above 0 it starts from hidden states, not from tokens."""

    @classmethod
    def of(
        cls,
        tree: DraftTree,
        table_width: int,
        has_logits: bool,
        taps: tuple[str, ...],
        first_layer: int,
    ) -> StepKey:
        """The key of a pass over ``tree``; of ``taps`` a step fills hidden states alone."""
        states = tuple(tap for tap in taps if tap != LOGITS_TAP)
        size, num_nodes = tree.draft_tokens.shape
        return cls(size, num_nodes, table_width, has_logits, states, first_layer)


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


class _TreeBuffers(NamedTuple):
    """What a step reads of a tree: views of one tensor, which goes to a GPU as one copy."""

    whole: torch.Tensor
    tokens: torch.Tensor
    depth: torch.Tensor
    num_nodes: torch.Tensor
    first_node: torch.Tensor
    ancestors: torch.Tensor

    @classmethod
    def make(cls, batch: int, num_nodes: int, device: torch.device) -> _TreeBuffers:
        rows, num_bits = batch * num_nodes, batch * num_nodes * num_words(MAX_NODES)
        # Two int32 in an int64: tokens and depth, then both counts.
        whole = torch.zeros(num_bits + rows + batch, dtype=torch.int64, device=device)
        ints = whole[num_bits:].view(torch.int32)
        tokens, depth, counts, first_node = ints.split([rows, rows, batch, batch])
        shape = batch, num_nodes
        bits = whole[:num_bits].view(*shape, -1)
        return cls(whole, tokens.view(shape), depth.view(shape), counts, first_node, bits)


class Step:
    """Static copies of what a step reads.

    Args:
        key: its sizes.
        output: what it gives, in the buffers that it writes.
        device: where it runs.
    """

    def __init__(self, key: StepKey, output: VerifyOutput, device: torch.device) -> None:
        self.output = output
        host = _TreeBuffers.make(key.batch, key.num_nodes, _CPU)
        there = host
        if device.type != "cpu":
            there = _TreeBuffers.make(key.batch, key.num_nodes, device)
        table = torch.zeros(key.batch, key.table_width, dtype=torch.int32, device=device)
        kv_len = torch.zeros(key.batch, dtype=torch.int32, device=device)
        self.tokens = there.tokens
        self.rows = StepRows(
            there.depth, there.ancestors, there.num_nodes, there.first_node, kv_len, table
        )
        self._host, self._there = host, there
        self._num_words = 0
        self._no_first = torch.zeros(key.batch, dtype=torch.int32)
        self._tree = [host.tokens, host.depth, host.num_nodes, host.first_node, host.ancestors]
        self._tables = [kv_len, table]

    def stage(self, tree: DraftTree, batch: CacheBatch, first_node: torch.Tensor | None) -> None:
        """Copy a round's tree and cache tables in: all of them, for a drafter may write the same
        tensors again."""
        if tree.ancestors.shape[-1] != self._num_words:
            self._num_words = tree.ancestors.shape[-1]
            self._host.ancestors.zero_()
            self._tree[-1] = self._host.ancestors[..., : self._num_words]
        if first_node is None:
            first_node = self._no_first
        # One call for all takes half of the time of a call for each.
        given = [tree.draft_tokens, tree.depth, tree.num_nodes, first_node, tree.ancestors]
        tables = [batch.kv_len, batch.block_table]
        if self._there is self._host:
            torch._foreach_copy_(self._tree + self._tables, given + tables)
            return
        torch._foreach_copy_(self._tree, given)
        pinned = may_be_reused(self._host.whole, self._there.whole.device)
        self._there.whole.copy_(pinned, non_blocking=True)
        torch._foreach_copy_(self._tables, tables)


def given(output: VerifyOutput, taps: tuple[str, ...], *, is_plain: bool) -> VerifyOutput:
    """What a pass returns of its buffers.

    Args:
        output: the step's.
        taps: what was asked for.
        is_plain: whether the buffers are float32 on the host.
    """
    output = output if is_plain else on_host(output)
    if LOGITS_TAP not in taps or output.logits.numel() == 0:
        return output
    return output._replace(taps={**output.taps, LOGITS_TAP: output.logits})


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
            Whether its workspace has moved, so that captured steps are stale.

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
        self.attention = torch.zeros(power_of_two(size), device=self._device)
        return True


@dataclass(frozen=True)
class Workspace:
    """Activations of up to ``rows`` rows, shared by all steps (which run one at a time)."""

    rows: int
    logit_rows: int
    """Of them, those with logits."""
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
            logit_rows=logit_rows,
            hidden=wide(config.hidden_size),
            normed=wide(config.hidden_size),
            qkv=wide(heads * config.head_dim),
            attended=wide(config.num_heads * config.head_dim),
            gate_up=wide(2 * config.intermediate_size),
            activated=wide(config.intermediate_size),
            feature=wide(config.hidden_size),
            logits=torch.empty(logit_rows, config.vocab_size, device=device),
        )

    def reaching(self, config: ModelConfig, rows: int, logit_rows: int) -> Workspace:
        """This one, if it has room for so many rows, or else a larger one.

        Sizes are powers of two, so that a growing load asks for few.
        """
        if rows <= self.rows and logit_rows <= self.logit_rows:
            return self
        return Workspace.make(
            config,
            max(self.rows, _FEW_ROWS, power_of_two(rows)),
            max(self.logit_rows, _FEW_ROWS, power_of_two(logit_rows)),
            self.hidden.dtype,
            self.hidden.device,
        )
