"""Logits by need: the head multiplies rows of a tree as the walk through it comes to them.

A walk reads the logits of the nodes on its path alone. On a CPU further rows of a product are not
free, so where the head is large it multiplies the likeliest nodes of a tree first; a node that the
walk comes to and that was not among them is multiplied with the likeliest below it, in another
pass. Bits are the same (a row's logits do not depend on other rows), so which rows are first and
whether it pays move times alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import torch

from specrt.accept import accept, empty_result
from specrt.draft.length.costs import RoundCost
from specrt.engine.batch import Batch
from specrt.models.model import LlamaModel
from specrt.models.step import LOGITS_TAP
from specrt.types import AcceptResult, DraftTree

_LEAST_BYTES = 1 << 25  # of a head that the caches do not hold
_LEAST_NODES = 16  # of a tree; smaller ones are mostly read anyway
_ROWS_A_PASS = 8  # of all sequences: about as many as cost what one does
_ACCEPTED = (0.7, 0.15, 0.06, 0.03, 0.02)  # of first, second, .. children (bundled FSPAD drafter)
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
        self._walks: _Walks | None = None  # the last round's

    def takes(self, tree: DraftTree, taps: Sequence[str]) -> bool:
        """Whether a round of such trees is for :meth:`accept`: nobody reads all logits."""
        return self._is_large and tree.parents.shape[1] >= _LEAST_NODES and LOGITS_TAP not in taps

    def accept(self, tree: DraftTree, features: torch.Tensor, batch: Batch) -> AcceptResult:
        """As ``specrt.accept.accept`` of all logits.

        Args:
            tree: B trees of N nodes.
            features: ``[B, N, H]`` float32, what the head multiplies.
            batch: the B sequences.
        """
        walks = _Walks(tree)
        num_first = _ROWS_A_PASS if self._pays_by_need(tree.parents.numel()) else walks.num_nodes
        result = empty_result(tree, batch.sampling.want_logprobs)
        wanted = walks.choose([0] * walks.batch, num_first)
        num_passes = 0
        while wanted:
            self._multiply(features.flatten(0, 1), wanted, walks.num_known)
            walks.know(wanted)
            accept(
                tree,
                self._logits[: walks.num_known],
                batch.sampling,
                batch.history,
                batch.history_len,
                out=result,
                logit_rows=walks.logit_rows,
                next_node=walks.next_node,
            )
            wanted = walks.choose(walks.next_node.tolist(), _ROWS_A_PASS)
            num_passes += 1
        self._walks = walks
        if num_first == _ROWS_A_PASS:
            self._num_passes += 0.1 * (num_passes - self._num_passes)
        return result

    def row_of(self, b: int, node: int) -> torch.Tensor:
        """The raw logits ``[V]`` of a node that the last walks came to, until the next ones."""
        assert self._walks is not None, "there was a round"
        return self._logits[self._walks.logit_rows[b, node]]

    def _pays_by_need(self, num_rows: int) -> bool:
        """What is measured says so; now and then the other way, so that both are measured."""
        self._num_rounds += 1
        by_need = self._num_passes * self._cost.relative(_ROWS_A_PASS)
        pays = by_need < self._cost.relative(num_rows)
        is_probe = self._num_rounds in (2, 16) or self._num_rounds % _PROBE_EVERY == 0
        return pays != is_probe

    def _multiply(self, features: torch.Tensor, wanted: Sequence[int], begin: int) -> None:
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


class _Walks:
    """Which nodes' logits are known, and which are likely to be wanted next."""

    def __init__(self, tree: DraftTree) -> None:
        self.batch, self.num_nodes = tree.parents.shape
        self.num_known = 0
        self.logit_rows = torch.full_like(tree.parents, -1)
        self.next_node = torch.zeros_like(tree.num_nodes)
        self._known = self.logit_rows.view(-1).numpy()  # the same memory
        counts = zip(tree.parents.tolist(), tree.num_nodes.tolist(), strict=True)
        self._children = [_children_of(parents[:count]) for parents, count in counts]

    def know(self, rows: Sequence[int]) -> None:
        """These rows of ``[B * N]`` got the next logits."""
        self._known[list(rows)] = range(self.num_known, self.num_known + len(rows))
        self.num_known += len(rows)

    def choose(self, nodes: Sequence[int], num_rows: int) -> list[int]:
        """Rows of ``[B * N]``: the nodes (-1: none), and the likeliest unknown ones below them.

        Args:
            nodes: one a sequence, unknown.
            num_rows: shared by the sequences; of each all it has if that is N.
        """
        num_open = sum(node >= 0 for node in nodes)
        each = num_rows if num_rows >= self.num_nodes else max(1, num_rows // max(1, num_open))
        return [
            b * self.num_nodes + node
            for b, start in enumerate(nodes)
            if start >= 0
            for node in self._likeliest(b, start, each)
        ]

    def _likeliest(self, b: int, start: int, count: int) -> list[int]:
        found: list[int] = []
        heap = [(-1.0, start)]
        children, first = self._children[b], b * self.num_nodes
        while heap and len(found) < count:
            chance, node = heappop(heap)
            if self._known[first + node] < 0:
                found.append(node)
            for rank, child in enumerate(children[node]):
                heappush(heap, (chance * _ACCEPTED[min(rank, len(_ACCEPTED) - 1)], child))
        return found


def _children_of(parents: Sequence[int]) -> list[list[int]]:
    """Of each node, in order; ``parents[i] < i`` in a settled tree."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    return children
