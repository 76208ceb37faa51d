"""What is kept of a drafter's tree, in plain Python, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Settled:
    """A tree, padded with zeros to N nodes; ancestors as one number each, of any size."""

    tokens: list[int]
    parents: list[int]
    depth: list[int]
    ancestors: list[int]
    num_nodes: int


def settle(
    tokens: Sequence[int],
    parents: Sequence[int],
    num_nodes: int,
    root: int,
    max_nodes: int,
    vocab_size: int,
    size: int,
) -> Settled:
    """The longest prefix of a draft that is a tree within bounds, below the given root."""
    kept = [root]
    for node in range(1, min(num_nodes, max_nodes, len(tokens), size)):
        if not (0 <= parents[node] < node and 0 <= tokens[node] < vocab_size):
            break
        kept.append(tokens[node])
    paths = [{0}]
    for node in range(1, len(kept)):
        paths.append(paths[parents[node]] | {node})
    padding = [0] * (size - len(kept))
    return Settled(
        kept + padding,
        [-1, *parents[1 : len(kept)], *padding],
        [len(path) - 1 for path in paths] + padding,
        [sum(1 << node for node in path) for path in paths] + padding,
        len(kept),
    )
