"""The draft model of EESD: the target's own first N layers, one trained layer, the target's head.

H hidden size, V vocabulary, M rows; g is what the first N layers give, z what the exit layer makes
of it (arXiv 2406.03853, section 3, as far as its text says; the calibration head's form is ours).
"""

from __future__ import annotations

import torch

from specrt import ops
from specrt.cache import CacheBatch, KVCache
from specrt.draft.eesd.checkpoint import ExitConfig, ExitWeights
from specrt.models.model import LlamaModel
from specrt.models.step import StepRows, layer_tap
from specrt.tree import MAX_NODES, ChainTrees


class ExitModel:
    """An exit of a target, as launches on given buffers; the first N layers are the target's.

    Args:
        config: where it reads.
        weights: the exit's own.
        target: the model whose first N layers it stands on.
    """

    def __init__(
        self,
        config: ExitConfig,
        weights: ExitWeights,
        target: LlamaModel,
    ) -> None:
        self.num_layers = config.exit_layer
        """N"""
        self.tap = layer_tap(config.exit_layer - 1)
        """The target's hidden states that the exit reads."""
        self.slope = weights.calibration_slope
        """``[2]``: factor of a draft's own log-odds in its confidence."""
        self.target = target
        self._weights = weights
        calibration = weights.calibration.shape[0], weights.calibration.shape[1]
        self._layer = LlamaModel(
            config.layer, weights.layer, target.device, ropes=target.ropes, others=[calibration]
        )
        self._chains = ChainTrees(target.device)

    @property
    def layer_bytes(self) -> int:
        """Weights of the exit layer that a step streams."""
        return self._weights.layer.arena.nbytes

    @property
    def head_bytes(self) -> int:
        """Weights of the head that a step streams."""
        return self._weights.layer.lm_head.nbytes

    def new_cache(self) -> KVCache:
        """An empty cache of the exit layer."""
        return self._layer.new_cache()

    def reserve(self, batch: int, num_nodes: int, num_positions: int) -> None:
        """Make room for the exit's steps of N rows of each of B sequences, at such positions."""
        self._layer.reserve(batch, num_nodes, num_positions)

    def launch_kv(
        self,
        states: torch.Tensor,
        rows: StepRows,
        cache: KVCache,
        *,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """The exit layer's keys and values of g, ``states [M, H]``, and nothing more; ``is_open``
        as for :meth:`LlamaModel.launch_kv`."""
        self._layer.launch_kv(0, states, rows, cache, is_open=is_open)

    def launch_exit(
        self,
        states: torch.Tensor,
        rows: StepRows,
        cache: KVCache,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        evidence: torch.Tensor,
    ) -> None:
        """Draft logits and evidence of g, ``states [M, H]``.

        Args:
            states: g.
            rows: where the rows stand in ``cache``.
            cache: the exit layer's.
            hidden: ``[M, H]``, scratch: z, then its norm.
            logits: ``[M, V]`` float32, written.
            evidence: ``[M, 2]`` float32, written: the calibration head's, of greedy and of coupled
                drafts.
        """
        self._layer.launch_layer(0, states, rows, cache, hidden)
        self._launch_head(hidden, logits, evidence)

    def launch_exit_rest(
        self,
        states: torch.Tensor,
        rows: StepRows,
        cache: KVCache,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        evidence: torch.Tensor,
        *,
        maxima: ops.DraftMaxima | None,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """The rest of :meth:`launch_exit` right behind :meth:`launch_kv`, and so its arguments;
        ``maxima`` of the logits are written besides, if the target :attr:`~LlamaModel.has_maxima`.
        Where all are closed nothing is."""
        self._layer.launch_rest(0, states, rows, cache, hidden, is_open=is_open)
        self._launch_head(hidden, logits, evidence, maxima, is_open)

    def _launch_head(
        self,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        evidence: torch.Tensor,
        maxima: ops.DraftMaxima | None = None,
        is_open: torch.Tensor | None = None,
    ) -> None:
        """Of z, ``hidden [M, H]``, which becomes its norm."""
        layer, weights = self._layer, self._weights
        layer.launch_head(hidden, hidden, logits, maxima, is_open=is_open)
        matrix, bias = weights.calibration, weights.calibration_bias
        layer.launch_linear(hidden, matrix, bias, out=evidence, is_open=is_open)

    def absorb(self, states: torch.Tensor, batch: CacheBatch) -> None:
        """Commit keys and values of known tokens: g, ``states [n, H]``, of one sequence."""
        for part in states.split(MAX_NODES):
            tokens = self.target.device.zeros(1, len(part), dtype=torch.int32)  # whatever they are
            shape = self._chains.of(tokens)
            rows = StepRows(
                shape.depth,
                shape.ancestors,
                shape.num_nodes,
                torch.zeros_like(shape.num_nodes),
                batch.kv_len,
                batch.block_table,
            )
            self._layer.reserve(1, len(part), batch.num_positions)
            self.launch_kv(part, rows, batch.cache)
            batch.move(shape.depth, shape.num_nodes)  # a chain's node i has depth i
            batch.advance([len(part)])
