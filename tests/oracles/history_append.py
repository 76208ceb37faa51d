"""What becomes of one sequence's history at the end of a round, in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STOP_TOKEN, MAX_LEN, BAD_LOGITS = 1, 2, 4
NAN_BITS = 0x7FC00000


@dataclass(frozen=True)
class Round:
    """One sequence before it: whatever its numbers hold. Log-probabilities are bits."""

    num_nodes: int
    depth: Sequence[int]
    path: Sequence[int]
    accept_length: int
    tokens: Sequence[int]
    logprobs: Sequence[int] | None
    stop_ids: Sequence[int]
    max_len: int
    history: Sequence[int]
    history_len: int
    root: int


@dataclass(frozen=True)
class Appended:
    """And after it."""

    max_len: int
    history: list[int]
    history_len: int
    root: int
    num_path: int
    report: list[int]


def append(before: Round) -> Appended:
    """Token after token, for as long as the sequence goes on."""
    size, history = len(before.tokens), list(before.history)
    limit = min(before.max_len, len(history)) if before.history_len >= 0 else before.history_len
    accepted = before.tokens[: max(0, before.accept_length + 1)]
    length, root, taken, has_stopped = before.history_len, before.root, 0, False
    for token in accepted:
        if has_stopped or length >= limit:
            break
        history[length] = root = token
        length += 1
        taken += 1
        has_stopped = token >= 0 and token in before.stop_ids
    ending = STOP_TOKEN * has_stopped + MAX_LEN * (length >= limit)
    ending += BAD_LOGITS * (before.accept_length < 0)
    nodes = min(max(before.num_nodes, 0), size)
    deepest = min(max([0, *before.depth[:nodes]]), size - 1)
    report = [nodes, deepest, len(accepted) - 1, taken, ending, 0, 0, 0]
    for column, padding in ((before.tokens, -1), (before.path, -1), (before.logprobs, NAN_BITS)):
        if column is not None:
            report += [*column[: len(accepted)], *[padding] * (size - len(accepted))]
    return Appended(0 if ending else before.max_len, history, length, root, taken, report)
