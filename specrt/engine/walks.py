"""Acceptance whose logits come by and by: as the head gives them, or as a request edits them.

A walk reads the logits of the nodes on its path alone, and stops at one that are not there. So
only those need be made, copied to the host or edited; then it goes on. Where it may stop nothing
is lost: the token it has come to is the last one of its round, and the next begins there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Protocol

import torch

from specrt.accept import accept, empty_result, logprobs_of
from specrt.device import Device
from specrt.engine.editor import EditError, Row
from specrt.engine.request import Request
from specrt.sampling import SamplingTable
from specrt.types import AcceptResult, DraftTree

_ACCEPTED = (0.7, 0.15, 0.06, 0.03, 0.02)  # of first, second, .. children (bundled FSPAD drafter)


class Source(Protocol):
    """Where raw logits come from."""

    @property
    def logits(self) -> torch.Tensor:
        """``[R, V]`` float32 on the host, which may be written."""

    def bring(self, walks: Walks, nodes: Sequence[int]) -> None:
        """See to it that these nodes' rows are among ``logits``, and say so to ``walks``.

        Args:
            walks: whose.
            nodes: one a sequence; -1: none.
        """


@dataclass(frozen=True)
class History:
    """The sequences as acceptance reads them, on the host."""

    sampling: SamplingTable
    tokens: torch.Tensor
    """``[B, T]`` int32"""
    lengths: torch.Tensor
    """``[B]`` int32"""


class Walks:
    """Which nodes' logits are there, and which are likely to be wanted next.

    Args:
        tree: B trees of N nodes, on the host.
        edited: sequences whose rows are read once they were edited (:meth:`open`).
    """

    def __init__(self, tree: DraftTree, edited: Sequence[int] = ()) -> None:
        self.batch, self.num_nodes = tree.parents.shape
        self.num_known = 0
        self.logit_rows = torch.full_like(tree.parents, -1)
        self.next_node = torch.zeros_like(tree.num_nodes)
        self.rows = [-1] * tree.parents.numel()
        """Of each node, ``b * N + node``: which raw logits it has; -1: none yet."""
        self._edited = frozenset(edited)
        self._open = self.logit_rows.view(-1).numpy()  # the same memory
        self._tree = tree
        self._children: list[list[list[int]]] | None = None

    def know(self, nodes: Sequence[int]) -> None:
        """These nodes (``b * N + node``) got the next logits."""
        for row, node in enumerate(nodes, start=self.num_known):
            self.rows[node] = row
            if node // self.num_nodes not in self._edited:
                self._open[node] = row
        self.num_known += len(nodes)

    def open(self, b: int, node: int) -> None:
        """An edited row may be read."""
        index = b * self.num_nodes + node
        self._open[index] = self.rows[index]

    def missing(self, nodes: Sequence[int]) -> list[int]:
        """Those of one node a sequence that have no logits; -1: it has, or is none."""
        places = enumerate(nodes)
        return [n if n >= 0 and self.rows[b * self.num_nodes + n] < 0 else -1 for b, n in places]

    def choose(self, nodes: Sequence[int], num_rows: int) -> list[int]:
        """The nodes (-1: none), and the likeliest unknown ones below them, as ``b * N + node``.

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
        if self._children is None:
            parents, counts = self._tree.parents.tolist(), self._tree.num_nodes.tolist()
            pairs = zip(parents, counts, strict=True)
            self._children = [_children_of(some[:count]) for some, count in pairs]
        found: list[int] = []
        heap = [(-1.0, start)]
        children, first = self._children[b], b * self.num_nodes
        while heap and len(found) < count:
            chance, node = heappop(heap)
            if self.rows[first + node] < 0:
                found.append(node)
            for rank, child in enumerate(children[node]):
                heappush(heap, (chance * _ACCEPTED[min(rank, len(_ACCEPTED) - 1)], child))
        return found


@dataclass(frozen=True)
class RawLogits:
    """The target's own logits of a round's nodes, until its next pass."""

    logits: torch.Tensor
    """``[B, N, V]`` where the target is, or ``[R, V]``."""
    rows: Sequence[int] | None = None
    """Of ``[R, V]``, that of node ``b * N + node``; -1: nobody asked for it."""
    num_nodes: int = 0
    """N, with ``rows``."""

    def row(self, b: int, node: int) -> torch.Tensor:
        """``[V]`` float32, of a node on the path of sequence ``b``."""
        if self.rows is None:
            return self.logits[b, node]
        place = self.rows[b * self.num_nodes + node]
        assert place >= 0, "a node that the walk came to"
        return self.logits[place]


@dataclass(frozen=True)
class Accepted:
    """What came of a round's logits."""

    result: AcceptResult
    raw: RawLogits
    errors: Mapping[int, str] = field(default_factory=dict)
    """Of sequences that come to an end by them: what is wrong."""


class AllLogits:
    """A source that has them all.

    Args:
        logits: ``[B, N, V]`` float32 on the host.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits.view(-1, logits.shape[-1])

    def bring(self, walks: Walks, nodes: Sequence[int]) -> None:
        """As :class:`Source`."""
        if walks.num_known == 0:
            walks.know(range(len(self.logits)))


class CopiedLogits:
    """A source that copies from a GPU what is asked for.

    Args:
        logits: ``[B, N, V]`` float32 there.
        device: it.
    """

    def __init__(self, logits: torch.Tensor, device: Device) -> None:
        self.logits = torch.empty(0, logits.shape[-1])
        self._there = logits
        self._device = device

    def bring(self, walks: Walks, nodes: Sequence[int]) -> None:
        """As :class:`Source`."""
        missing = [(b, node) for b, node in enumerate(walks.missing(nodes)) if node >= 0]
        if not missing:
            return
        rows = self._device.read(torch.stack([self._there[b, node] for b, node in missing]))
        self.logits = torch.cat([self.logits, rows])
        walks.know([b * walks.num_nodes + node for b, node in missing])


class Edits:
    """The edits of a round's rows.

    Args:
        requests: B of them, in the order of the rows; some have an editor.
        tree: theirs, on the host.
    """

    def __init__(self, requests: Sequence[Request], tree: DraftTree) -> None:
        self._requests = requests
        self._tokens, self._parents = tree.draft_tokens.tolist(), tree.parents.tolist()
        self.rows = [row for row, request in enumerate(requests) if request.editor is not None]
        """Who has one."""
        self.errors: dict[int, str] = {}
        """Of sequences whose root's logits could not be edited."""

    def edited(self, b: int, node: int, raw: Row) -> Row | None:
        """A node's logits, edited; None: the walk ends before it.

        What fails further down the tree fails again as a root, if the text comes to it.
        """
        request = self._requests[b]
        assert request.editor is not None, "one of those that are edited"
        output = request.output_ids + self._path(b, node)
        if not math.isfinite(raw.max()):
            return None  # and of a root says so who finds that nothing came of it
        if request.editor.is_over(output):
            return raw  # whatever comes there is cut off
        try:
            return request.editor.edited(output, raw)
        except EditError as error:
            if node == 0:
                self.errors[b] = str(error)
            return None

    def _path(self, b: int, node: int) -> list[int]:
        """Drafted tokens from behind the root to the node."""
        path: list[int] = []
        while node > 0:
            path.append(self._tokens[b][node])
            node = self._parents[b][node]
        return path[::-1]


def walk(
    tree: DraftTree, source: Source, history: History, edits: Edits | None = None
) -> tuple[AcceptResult, Walks]:
    """As ``specrt.accept.accept``, of logits that come as they are wanted.

    Args:
        tree: B trees of N nodes, on the host.
        source: of the raw logits. As the walks end they are what they were.
        history: the B sequences.
        edits: of some of them; log-probabilities are those of the raw logits.

    Returns:
        The result, and of each node where in ``source`` its logits lie.
    """
    result = empty_result(tree, history.sampling.want_logprobs)
    walks = Walks(tree, () if edits is None else edits.rows)
    raw: dict[int, Row] = {}
    if edits is not None:  # whose walks may not even begin
        _write_nothing(result)
    nodes = [0] * walks.batch
    while any(node >= 0 for node in nodes):
        source.bring(walks, nodes)
        if edits is not None:
            _edit(edits, source, walks, nodes, raw)
        accept(
            tree,
            source.logits[: walks.num_known],
            history.sampling,
            history.tokens,
            history.lengths,
            out=result,
            logit_rows=walks.logit_rows,
            next_node=walks.next_node,
        )
        nodes = walks.next_node.tolist()
    for row, logits in raw.items():
        source.logits.numpy()[row] = logits
    if edits is not None and result.logprobs is not None:
        _tell_raw_logprobs(edits.rows, source, walks, result)
    return result, walks


def _edit(
    edits: Edits, source: Source, walks: Walks, nodes: Sequence[int], raw: dict[int, Row]
) -> None:
    """Edit the rows that walks have come to; what stood there goes to ``raw``."""
    for b in edits.rows:
        node = nodes[b]
        if node < 0:
            continue
        place = walks.rows[b * walks.num_nodes + node]
        row = source.logits.numpy()[place]
        edited = edits.edited(b, node, row)
        if edited is None:
            walks.next_node[b] = -1
            continue
        if edited is not row:
            raw[place] = row.copy()
            row[:] = edited
        walks.open(b, node)


def _write_nothing(result: AcceptResult) -> None:
    for part in (result.path, result.tokens, result.accept_length):
        part.fill_(-1)
    if result.logprobs is not None:
        result.logprobs.fill_(math.nan)


def _tell_raw_logprobs(
    edited: Sequence[int], source: Source, walks: Walks, result: AcceptResult
) -> None:
    """Log-probabilities of edited sequences' tokens under the raw logits."""
    assert result.logprobs is not None, "asked for"
    for b in edited:
        count = int(result.accept_length[b]) + 1
        path, tokens = result.path[b, :count].tolist(), result.tokens[b, :count].tolist()
        rows = [walks.rows[b * walks.num_nodes + node] for node in path]
        if rows:
            result.logprobs[b, :count] = logprobs_of(source.logits[torch.tensor(rows)], tokens)


def _children_of(parents: Sequence[int]) -> list[list[int]]:
    """Of each node, in order; ``parents[i] < i`` in a settled tree."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    return children
