"""A target, of whatever family, over trees of tokens.

One forward pass serves decoding, verification and prefill: a lone token is a tree of one node, a
piece of a prompt is a chain. Every op on the way is row-invariant, so a node's logits are those of
decoding it alone, to the bit.

Weights and cache keep the model's dtype. Activations, and the taps among them, are float32 on the
CPU and of the weights' dtype on a GPU, where kernels compute in float32 and round each result once;
logits are float32. Both stay where the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple
from weakref import WeakSet

import torch

from specrt import ops
from specrt.cache import CacheBatch, KVCache
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.models.decoder import Decoder
from specrt.models.fair_lock import FairLock
from specrt.models.launched_run import LaunchedRun
from specrt.models.layer_run import LowerLayers
from specrt.models.loader import Weights
from specrt.models.prefill import Piece, Prompts
from specrt.models.rope import RotaryTable
from specrt.models.step import (
    FINAL_TAP,
    Step,
    StepKey,
    StepRows,
    check_tap,
    layer_tap,
    with_logits_tap,
)
from specrt.reuse import Recent
from specrt.tree import MAX_NODES
from specrt.types import DraftTree, VerifyOutput

_MAX_STEPS = 1024  # whose buffers are kept: those of the sizes that came up last


class BoundPass(NamedTuple):
    """A forward pass over given tensors."""

    output: VerifyOutput
    """What a launch writes."""
    launch: Callable[[], None]
    """Nothing but ops on buffers that stay."""


class LlamaModel(Decoder):
    """A target (or a small drafting model): weights, rotary table and reusable buffers.

    Args:
        config: the architecture.
        weights: as :func:`specrt.models.loader.load_weights` gives them, heads padded or not.
        device: where the weights are, and how its steps run; None: there, by itself. Its drafter
            runs on the same one.
        activation_dtype: of the buffers between the kernels; None: float32 on the CPU, the
            weights' dtype on a GPU.
        ropes: rotary tables of another model, used where this one's would be the same.
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
        ropes: Collection[RotaryTable] = (),
        others: Sequence[tuple[int, int]] = (),
    ) -> None:
        device = device or Device(weights.arena.device)
        self.dtype = weights.dtype
        dtype = activation_dtype or device.activation_dtype(self.dtype)
        super().__init__(config, weights, device, dtype, ropes, others)
        self._steps: Recent[StepKey, Step] = Recent(_MAX_STEPS)
        self._tap_buffers: dict[str, torch.Tensor] = {}
        self._caches: WeakSet[KVCache] = WeakSet()
        self.prompts = Prompts(self.device)  # how they are cut into pieces
        self.lock = FairLock()  # who has it may use the buffers, and what `forward` gave

    def __repr__(self) -> str:
        forms = ", ".join(
            f"{form} {size / 1e6:.1f} MB" for form, size in self.weights.forms.items()
        )
        cache = str(self.dtype).removeprefix("torch.")
        return (
            f"LlamaModel({self.config.num_layers} layers of {self.config.hidden_size}, weights "
            f"{forms}, keys and values {cache}, on {self.device})"
        )

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
            has_logits: False skips the LM head; logits are then ``[B, 0, V]``.
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
        step = self._step(key, batch.num_positions)
        step.stage(tree, batch, first_node)
        start = self._start(key)
        if run is None:
            self.embed_tokens(step.tokens.view(-1), step.rows, start)
        else:
            run.copy_states(num_nodes, start)
        # A graph holds addresses of all of these; as part of its key they outlive it.
        steps = self, batch.cache, step
        self.device.run(steps, lambda: self._launch(key, start, step.rows, batch.cache))
        return with_logits_tap(step.output, taps)

    def bind(
        self,
        tree: DraftTree,
        batch: CacheBatch,
        *,
        taps: tuple[str, ...] = (),
        maxima: ops.TileMaxima | None = None,
        run: LaunchedRun | None = None,
    ) -> BoundPass:
        """A pass of :meth:`forward` that reads these very tensors each time it is launched.

        It stands until the device's steps go stale (:attr:`Device.version`), or the batch's tables
        move.

        Args:
            tree: B trees of N nodes; what it holds may change between launches.
            batch: likewise.
            taps: as for :meth:`forward`.
            maxima: on a GPU, of the logits, to be written with them, if it :attr:`has_maxima`;
                None: not wanted.
            run: of all layers that it has run, which are left out; it gives these taps, and has run
                the trees each time. None: all layers.

        Raises:
            ValueError: as :meth:`forward`.
        """
        given = {} if run is None else {layer_tap(run.shape.num_layers - 1): run.states}
        first, own = 0 if run is None else run.shape.num_layers, [t for t in taps if t not in given]
        key = StepKey.of(tree, batch.block_table.shape[1], True, tuple(own), first)
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
            start = self._start(key) if run is None else run.states.flatten(0, 1)
            if run is None:
                self.embed_tokens(tree.draft_tokens.view(-1), rows, start)
            self._launch(key, start, rows, batch.cache, maxima)

        output = self._output(key)
        output = output._replace(taps={**output.taps, **{t: given[t] for t in taps if t in given}})
        return BoundPass(with_logits_tap(output, taps), launch)

    def extend(
        self, ids: Sequence[int], batch: CacheBatch, taps: tuple[str, ...] = ()
    ) -> Iterator[tuple[int, Mapping[str, torch.Tensor]]]:
        """Run known tokens of one sequence and commit them, piece by piece (prefill).

        Args:
            ids: the tokens that follow what ``batch``, of one sequence, holds; a prompt may come
                in any number of calls, to the same bits.
            batch: their cache, with pages for them.
            taps: as for :meth:`forward`; there are no logits.

        Yields:
            An index in ``ids`` and the taps ``[1, n, H]`` from there on, n at most 128; all in
            order. They are valid until the model runs again.
        """
        for piece in self.prompts.pieces(ids, batch):
            states = self._run_piece(piece, batch, taps)
            batch.move(piece.path, piece.num_path)
            batch.advance([piece.cut.count])
            yield from piece.slices(states)

    def _run_piece(
        self, piece: Piece, batch: CacheBatch, taps: tuple[str, ...]
    ) -> Mapping[str, torch.Tensor]:
        """Taps ``[C, length, H]`` of a piece's chains."""
        key = StepKey.of(piece.tree, batch.block_table.shape[1], False, taps, 0)
        key = key._replace(is_chained=piece.cut.num_chains > 1)
        step = self._step(key, batch.num_positions)
        step.stage(piece.tree, piece.tables)
        start = self._start(key)
        self.embed_tokens(step.tokens.view(-1), step.rows, start)
        self.device.run(
            (self, batch.cache, step), lambda: self._launch(key, start, step.rows, batch.cache)
        )
        return step.output.taps

    # --- steps: where a pass reads and writes -------------------------------------------------

    def _ensure_buffers(self, key: StepKey, num_positions: int) -> None:
        self.reserve(key.batch, key.num_nodes, num_positions, has_logits=key.has_logits)
        for tap in key.taps:
            if tap == FINAL_TAP or tap in self._tap_buffers:
                continue
            check_tap(tap, self.config.num_layers)
            self._tap_buffers[tap] = torch.empty_like(self._workspace.hidden)

    def _step(self, key: StepKey, num_positions: int) -> Step:
        """The buffers of a step, and room in those that all share."""
        self._ensure_buffers(key, num_positions)
        step = self._steps.get(key)
        return step or self._steps.put(key, Step(key, self._output(key), self.device))

    def _forget_buffers(self) -> None:
        self._steps.clear()
        super()._forget_buffers()
        self._tap_buffers.clear()  # last: an interrupt must not leave launches over what is gone

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

    def _launch(
        self,
        key: StepKey,
        hidden: torch.Tensor,
        rows: StepRows,
        cache: KVCache,
        maxima: ops.TileMaxima | None = None,
    ) -> None:
        """The layers from ``key.first_layer`` on over ``hidden [B * N, H]``, and the head."""
        count, last = key.batch * key.num_nodes, self.config.num_layers - 1
        work = self._workspace
        for index in range(key.first_layer, last + 1):
            if index == last and not key.reads_layer(last):
                self.launch_kv(last, hidden, rows, cache)
                return
            # A tapped layer's output is read by the next layer where it lies, never written.
            is_tapped = layer_tap(index) in key.taps
            out = (self._tap_buffers[layer_tap(index)] if is_tapped else work.hidden)[:count]
            self.launch_layer(index, hidden, rows, cache, out)
            hidden = out
        if key.has_logits or FINAL_TAP in key.taps:
            logits = work.logits[:count] if key.has_logits else None
            self.launch_head(hidden, work.feature[:count], logits, maxima)
