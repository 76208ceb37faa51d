"""Logits by need: the head multiplies rows of a tree as the walk through it comes to them.

A walk reads the logits of the nodes on its path alone. On a CPU further rows of a product are not
free, so where the head is large it multiplies the likeliest nodes of a tree first; a node that the
walk comes to and that was not among them is multiplied with the likeliest below it, in another
pass. Bits are the same (a row's logits do not depend on other rows), so which rows are first and
whether it pays move times alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specrt.draft.length.costs import RoundCost
from specrt.engine.walks import Accepted, Edits, History, RawLogits, Walks, walk
from specrt.models.model import LlamaModel
from specrt.models.step import LOGITS_TAP
from specrt.types import DraftTree

_LEAST_BYTES = 1 << 25  # of a head that the caches do not hold
_LEAST_NODES = 16  # of a tree; smaller ones are mostly read anyway
_ROWS_A_PASS = 8  # of all sequences: about as many as cost what one does
_PROBE_EVERY = 64  # rounds, of which one goes the other way, to measure it


class HeadByNeed:
    """Head and acceptance of a target on a CPU.

    Args:
        target: whose head it is.
    """

    def __init__(self, target: LlamaModel) -> None:
        self._target = target
        head = target.weights.lm_head
        self._is_large = not target.device.is_gpu and head.nbytes >= _LEAST_BYTES
        self._cost = RoundCost()  # of a pass over the head, by rows
        self._num_passes = 2.0  # of a round, in the mean
        self._num_rounds = 0
        self._logits = torch.empty(0, target.config.vocab_size)

    def takes(self, tree: DraftTree, taps: Sequence[str]) -> bool:
        """Whether a round of such trees is for :meth:`accept`: nobody reads all logits."""
        return self._is_large and tree.parents.shape[1] >= _LEAST_NODES and LOGITS_TAP not in taps

    def accept(
        self,
        tree: DraftTree,
        features: torch.Tensor,
        history: History,
        edits: Edits | None = None,
    ) -> Accepted:
        """As ``specrt.accept.accept`` of all logits.

        Args:
            tree: B trees of N nodes.
            features: ``[B, N, H]`` float32, what the head multiplies.
            history: the B sequences.
            edits: of some of them.
        """
        by_need = self._pays_by_need(tree.parents.numel())
        num_first = _ROWS_A_PASS if by_need else tree.parents.shape[1]
        rows = _NeededRows(self, features.flatten(0, 1), num_first)
        result, walks = walk(tree, rows, history, edits)
        if by_need:
            self._num_passes += 0.1 * (rows.num_passes - self._num_passes)
        raw = RawLogits(rows.logits, walks.rows, walks.num_nodes)
        return Accepted(result, raw, {} if edits is None else edits.errors)

    @property
    def logits(self) -> torch.Tensor:
        """Those of this round, and room."""
        return self._logits

    def _pays_by_need(self, num_rows: int) -> bool:
        """What is measured says so; now and then the other way, so that both are measured."""
        self._num_rounds += 1
        by_need = self._num_passes * self._cost.relative(_ROWS_A_PASS)
        pays = by_need < self._cost.relative(num_rows)
        is_probe = self._num_rounds in (2, 16) or self._num_rounds % _PROBE_EVERY == 0
        return pays != is_probe

    def multiply(self, features: torch.Tensor, wanted: Sequence[int], begin: int) -> None:
        """Logits of these rows, from row ``begin`` on."""
        end = begin + len(wanted)
        if end > len(self._logits):
            grown = self._logits.new_empty(max(end, len(features)), self._logits.shape[1])
            grown[:begin] = self._logits[:begin]
            self._logits = grown
        device = self._target.device
        start = device.mark()
        rows = features[torch.tensor(wanted)]
        self._target.launch_logits(rows, self._logits[begin:end])
        self._cost.observe(len(wanted), device.ms_between(start, device.mark()))


class _NeededRows:
    """A round's source of logits.

    Args:
        head: multiplies.
        features: ``[B * N, H]``
        num_first: rows of its first pass.
    """

    def __init__(self, head: HeadByNeed, features: torch.Tensor, num_first: int) -> None:
        self._head = head
        self._features = features
        self._num_rows = num_first
        self.num_passes = 0

    @property
    def logits(self) -> torch.Tensor:
        """As :class:`~specrt.engine.walks.Source`."""
        return self._head.logits

    def bring(self, walks: Walks, nodes: Sequence[int]) -> None:
        """As :class:`~specrt.engine.walks.Source`: with the likeliest nodes below them."""
        wanted = walks.choose(walks.missing(nodes), self._num_rows)
        if not wanted:
            return
        self._head.multiply(self._features, wanted, walks.num_known)
        walks.know(wanted)
        self.num_passes += 1
        self._num_rows = _ROWS_A_PASS
