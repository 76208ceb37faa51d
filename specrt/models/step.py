"""Buffers of forward passes: what a step reads, at addresses that captured graphs may keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from specrt import ops
from specrt.cache import KVCache
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.models.layer import LayerPages, adds_apart
from specrt.reuse import power_of_two
from specrt.tree import MAX_NODES, num_words
from specrt.types import DraftTree, VerifyOutput

_FEW_ROWS = 16  # that a workspace has room for at least
_MANY_ROWS = 1 << 20  # beyond some hundreds, a workspace of linear is as large for any number

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
    is_chained: bool = False
    """As :attr:`StepRows.is_chained`."""

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

    def reads_layer(self, last: int) -> bool:
        """Whether somebody reads what the last layer, of this number, gives."""
        return self.has_logits or FINAL_TAP in self.taps or layer_tap(last) in self.taps


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
    block_tables: tuple[torch.Tensor, ...]
    """``[B, max_pages]`` int32 for each group of layers (:meth:`specrt.cache.KVCache.group_of`)."""
    is_chained: bool = False
    """Whether the B are one sequence, each going on where the one before it ends: then all keys and
    values are in the cache before any row looks there."""

    def pages(self, cache: KVCache, layer: int) -> LayerPages:
        """Where a layer's rows lie."""
        return LayerPages(*cache.layer(layer), self.block_tables[cache.group_of(layer)])


class Tables(Protocol):
    """Where sequences' rows lie, as a :class:`~specrt.cache.CacheBatch` has it."""

    @property
    def kv_len(self) -> torch.Tensor:
        """``[B]`` int32"""

    @property
    def block_tables(self) -> tuple[torch.Tensor, ...]:
        """``[B, max_pages]`` int32, of each group of layers."""


class Step:
    """Static copies of what a step reads.

    Args:
        key: its sizes.
        output: what it gives, in the buffers that it writes.
        device: where it runs.
        num_groups: of layers, each of which has a table.
    """

    def __init__(self, key: StepKey, output: VerifyOutput, device: Device, num_groups: int) -> None:
        self.output = output
        shape = key.batch, key.num_nodes
        self.tokens, depth = device.zeros(2, *shape, dtype=torch.int32)
        numbers = device.zeros(4, key.batch, dtype=torch.int32)
        num_nodes, first_node, kv_len, self._no_first = numbers
        self._bits = device.zeros(*shape, num_words(MAX_NODES), dtype=torch.int64)
        sizes = num_groups, key.batch, key.table_width
        tables = device.zeros(*sizes, dtype=torch.int32).unbind()
        self.rows = StepRows(
            depth, self._bits, num_nodes, first_node, kv_len, tables, key.is_chained
        )
        self._num_words = 0
        counts = num_nodes, first_node, kv_len
        self._copies = [self.tokens, depth, *counts, *tables, self._bits]

    def stage(
        self, tree: DraftTree, tables: Tables, first_node: torch.Tensor | None = None
    ) -> None:
        """Copy a round's tree and cache tables in: all of them, for a drafter may write the same
        tensors again."""
        if tree.ancestors.shape[-1] != self._num_words:
            num_words = tree.ancestors.shape[-1]
            self._bits.zero_()
            self._copies[-1], self._num_words = self._bits[..., :num_words], num_words
        if first_node is None:
            first_node = self._no_first
        # One call for all takes half of the time of a call for each.
        torch._foreach_copy_(
            self._copies,
            [
                tree.draft_tokens,
                tree.depth,
                tree.num_nodes,
                first_node,
                tables.kv_len,
                *tables.block_tables,
                tree.ancestors,
            ],
        )


def with_logits_tap(output: VerifyOutput, taps: tuple[str, ...]) -> VerifyOutput:
    """A pass's output with its logits among the taps, if ``taps`` asks for them."""
    if LOGITS_TAP not in taps or output.logits.numel() == 0:
        return output
    return output._replace(taps={**output.taps, LOGITS_TAP: output.logits})


class GpuScratch:
    """What kernels on a GPU want beside their operands; launches share it one after another.

    Args:
        config: the model's.
        matrices: shapes ``[N, K]`` of all that is multiplied by.
        device: where to; the memory there stays at its place unless attention needs more.
    """

    def __init__(
        self, config: ModelConfig, matrices: Iterable[tuple[int, int]], device: Device
    ) -> None:
        self._config = config
        self._device = device
        layers = range(config.num_layers)
        self._windows = frozenset(config.form.layer(index).window for index in layers)
        sizes = (ops.linear_workspace(*shape, _MANY_ROWS) for shape in frozenset(matrices))
        self.linear = device.zeros(max(sizes))
        """A workspace of ``linear`` for every matrix and any number of rows; it is zeroed once."""
        self.attention = device.zeros(0)
        """A workspace of ``tree_attention`` for the largest step that came up."""

    def prepare(self, batch: int, num_nodes: int, num_positions: int) -> None:
        """Make room for a step's attention.

        Args:
            batch: its sequences.
            num_nodes: rows of each.
            num_positions: that their pages have room for.
        """
        config = self._config
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        size = max(
            ops.tree_attention_workspace(
                batch, *heads, num_nodes, num_positions, self._device.place, sliding_window=window
            )
            for window in self._windows
        )
        if size > self.attention.numel():
            larger = self._device.zeros(power_of_two(size))
            self._device.forget()  # first: an interrupt must not leave launches over what is gone
            self.attention = larger


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
    branch: torch.Tensor
    """What a branch gives; of no width where it is added at once."""
    gate_up: torch.Tensor
    """Before the activation; of no width where one launch gives ``activated``."""
    activated: torch.Tensor
    feature: torch.Tensor
    logits: torch.Tensor
    """float32, whatever the activations are."""
    packed_inputs: int
    """The most columns of a packed matrix."""
    linear: torch.Tensor
    """On the CPU: what ``linear`` makes of rows before packed matrices multiply them."""
    is_interleaved: bool
    """As :attr:`~specrt.models.loader.Weights.is_interleaved`."""

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        rows: int,
        logit_rows: int,
        dtype: torch.dtype,
        device: Device,
        packed_inputs: int = 0,
        *,
        is_interleaved: bool = False,
    ) -> Workspace:
        """Buffers for ``rows`` rows of ``dtype``, ``logit_rows`` of them with logits."""
        heads = config.num_heads + 2 * config.num_kv_heads
        inputs = config.intermediate_size * (2 if config.form.is_gated else 1)

        def wide(num_columns: int) -> torch.Tensor:
            return device.empty(rows, num_columns, dtype=dtype)

        return cls(
            rows=rows,
            logit_rows=logit_rows,
            hidden=wide(config.hidden_size),
            normed=wide(config.hidden_size),
            qkv=wide(heads * config.head_dim),
            attended=wide(config.num_heads * config.head_dim),
            branch=wide(config.hidden_size if adds_apart(config.form) else 0),
            gate_up=wide(0 if is_interleaved else inputs),
            activated=wide(config.intermediate_size),
            feature=wide(config.hidden_size),
            logits=device.empty(logit_rows, config.vocab_size),
            packed_inputs=packed_inputs,
            linear=ops.row_scratch(packed_inputs, rows) if packed_inputs else device.empty(0),
            is_interleaved=is_interleaved,
        )

    def reaching(
        self, config: ModelConfig, rows: int, logit_rows: int, device: Device
    ) -> Workspace:
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
            device,
            self.packed_inputs,
            is_interleaved=self.is_interleaved,
        )
