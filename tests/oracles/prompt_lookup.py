"""Prompt lookup by looking at every place, in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """One sequence: its history, all slots of it, and how it is looked through."""

    history: Sequence[int]
    history_len: int
    max_len: int
    max_ngram: int = 4
    min_ngram: int = 1
    num_continuations: int = 3
    depth: int = 15


@dataclass(frozen=True)
class Drafted:
    """A tree of M nodes."""

    draft_tokens: list[int]
    parents: list[int]
    num_nodes: int
    match_len: int
    longest: int


def matching(tokens: Sequence[int], search: Search) -> tuple[int, list[int]]:
    """Length of the longest suffix that occurred before, and where it ended, the latest first."""
    for size in range(min(search.max_ngram, len(tokens) - 1), search.min_ngram - 1, -1):
        suffix = tokens[len(tokens) - size :]
        ends = [e for e in range(len(tokens) - 1, size - 1, -1) if tokens[e - size : e] == suffix]
        if ends:
            return size, ends[: search.num_continuations]
    return 0, []


def draft(search: Search, size: int) -> Drafted:
    """The tree of at most ``size`` nodes."""
    tokens = list(search.history[: max(0, search.history_len)])
    depth = min(search.depth, size - 1, search.max_len - len(tokens) - 1)
    match, ends = matching(tokens, search) if depth > 0 else (0, [])
    paths = {(): 0}
    nodes, longest = [(tokens[-1] if tokens else 0, -1)], 0
    for end in ends:
        path = (tokens[end:] * depth)[:depth]
        for count in range(1, depth + 1):
            if tuple(path[:count]) not in paths:
                if len(nodes) == size:
                    break
                nodes.append((path[count - 1], paths[tuple(path[: count - 1])]))
                paths[tuple(path[:count])] = len(nodes) - 1
            longest = max(longest, count)
    padded = nodes + [(0, 0)] * (size - len(nodes))
    drafted, parents = map(list, zip(*padded, strict=True))
    return Drafted(drafted, parents, len(nodes), match, longest)
