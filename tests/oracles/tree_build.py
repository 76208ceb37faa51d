"""The dynamic tree in plain Python, one sequence at a time: expand level by level, then rerank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# A node's children: (row of the draft head, score relative to the node's), best first.
Ranking = list[tuple[int, float]]


def before(score: float, index: int) -> tuple[bool, float, int]:
    """Sort key: larger first, NaN last, then the lower index."""
    return (True, 0.0, index) if math.isnan(score) else (False, -score, index)


def ranking(row: Sequence[float], top_k: int, scale: float | None = None) -> Ranking:
    """Log-probabilities over the row; with ``scale``, of ``row / scale`` over the children."""
    if any(math.isnan(x) or x == math.inf for x in row) or max(row) == -math.inf:
        return [(i, math.nan) for i in range(top_k)]
    order = sorted(range(len(row)), key=lambda i: before(row[i], i))[:top_k]
    if scale is None:
        law = {i: x - row[order[0]] for i, x in enumerate(row)}
    else:
        law = {i: (row[i] - row[order[0]]) / scale for i in order}
    log_sum = math.log(sum(math.exp(x) for x in law.values()))
    return [(i, min(law[i] - log_sum, 0.0)) for i in order]


def level_score(below: Sequence[float], above: Sequence[float]) -> float:
    """ln of the frontier's probability, given that of the frontier it grew from."""
    if any(map(math.isnan, [*below, *above])) or max(above) == -math.inf:
        return math.nan
    mass = math.fsum(math.exp(x - max(above)) for x in below)
    if mass == 0.0:
        return -math.inf
    return min(0.0, math.log(mass) - math.log(math.fsum(math.exp(x - max(above)) for x in above)))


@dataclass
class Node:
    score: float = 0.0
    candidate: int = -1
    ancestors: int = 0
    source: int = 0
    token: int = 0


@dataclass
class Growth:
    """The pool so far, and the frontier to expand next."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    frontier: list[Node] = field(default_factory=lambda: [Node()])

    def expand(
        self, rankings: Sequence[Ranking], level: int, bits: int, token_map: Sequence[int] | None
    ) -> None:
        """One level, from each frontier node's ranking; ``bits`` is the room for ancestors."""
        first, top_k, sources = len(self.tokens), len(rankings[0]), []
        for source, (node, children) in enumerate(zip(self.frontier, rankings, strict=True)):
            for row, increment in children:
                self.tokens.append(row if token_map is None else token_map[row])
                self.parents.append(node.candidate)
                self.scores.append(node.score + increment)
                sources.append(source)
        best = sorted(range(first, len(self.tokens)), key=lambda c: before(self.scores[c], c))
        above, self.frontier = self.frontier, []
        for j, c in enumerate(best[:top_k]):
            source, own = sources[c - first], level * top_k + j
            ancestors = above[source].ancestors | (1 << own if own < bits else 0)
            self.frontier.append(Node(self.scores[c], c, ancestors, source, self.tokens[c]))


@dataclass
class Tree:
    tokens: list[int]
    parents: list[int]
    scores: list[float]


def rerank(
    tokens: Sequence[int], parents: Sequence[int], scores: Sequence[float], root: int, size: int
) -> Tree:
    """The best ``size - 1`` candidates below the root."""
    usable = [c for c in range(len(scores)) if scores[c] > -math.inf]
    best = sorted(usable, key=lambda c: before(scores[c], c))[: size - 1]
    tree = Tree([root], [-1], [0.0])
    for node, c in enumerate(best, start=1):
        parent = 0 if parents[c] < 0 else best.index(parents[c]) + 1
        assert parent < node
        tree.tokens.append(tokens[c])
        tree.parents.append(parent)
        tree.scores.append(scores[c])
    return tree
