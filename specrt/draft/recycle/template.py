"""The shape of a recycled tree: which ranks are worth a node, the likeliest first."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

NUM_RANKS = 8
"""Next tokens that are remembered of each token."""

RATES = (0.55, 0.12, 0.06, 0.04, 0.025, 0.02, 0.015, 0.012)
"""Chance that the token of a rank comes next, as the bundled target's text has it."""


@dataclass(frozen=True, eq=False)
class Template:
    """Nodes by the chance of their path, falling; so every first few of them are a tree."""

    parents: npt.NDArray[np.int64]
    """``[M]``; the root's is 0."""
    ranks: npt.NDArray[np.int64]
    """``[M]``: which of its parent's next tokens a node is."""
    depth: npt.NDArray[np.int64]
    """``[M]``."""
    scores: npt.NDArray[np.float32]
    """``[M]``: log-probability of the path."""
    levels: tuple[npt.NDArray[np.int64], ...]
    """The nodes of each depth from 1."""


@lru_cache(maxsize=64)
def make_template(num_nodes: int, depth: int, top_k: int) -> Template:
    """The ``num_nodes`` likeliest rank paths of at most ``depth`` steps and ``top_k`` ranks.

    Args:
        num_nodes: M at most, the root included, at least 1.
        depth: of the deepest node, 0 for the root alone.
        top_k: children of a node, and nodes of each depth that have any.
    """
    nodes: list[tuple[int, int, int, float]] = []
    waiting = [(-0.0, 0, -1, 0, 0)]  # minus the score, first come first, parent, rank, depth
    count = 1
    num_expanded = [0] * (depth + 1)
    while waiting and len(nodes) < num_nodes:
        loss, _, parent, rank, level = heapq.heappop(waiting)
        me = len(nodes)
        nodes.append((max(parent, 0), rank, level, -loss))
        if level == depth or num_expanded[level] == top_k:
            continue
        num_expanded[level] += 1
        for child in range(min(top_k, NUM_RANKS)):
            price = loss - float(np.log(RATES[child]))
            heapq.heappush(waiting, (price, count, me, child, level + 1))
            count += 1
    parents, chosen, depths, scores = map(np.array, zip(*nodes, strict=True))
    levels = tuple(np.flatnonzero(depths == d) for d in range(1, depths.max() + 1))
    return Template(parents, chosen, depths, scores.astype(np.float32), levels)
