"""The tail of acceptance: tokens into the history, where it ends, one report for the host."""

from __future__ import annotations

from enum import IntEnum, IntFlag

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "history_append(Tensor num_nodes, Tensor depth, Tensor path, Tensor accept_length, "
    "Tensor tokens, Tensor? logprobs, Tensor stop_ids, Tensor(a!) max_len, "
    "Tensor(b!) history, Tensor(c!) history_len, Tensor(d!) roots, Tensor(e!) num_path, "
    "Tensor(f!) report) -> ()",
    _C.history_append,
)

HEADER_SIZE = 8
"""Words of a report before its tokens."""


class ReportWord(IntEnum):
    """Words of a report's header; the others are 0."""

    NUM_NODES = 0
    DEEPEST = 1
    """The largest distance from the root."""
    ACCEPT_LENGTH = 2
    NUM_TAKEN = 3
    ENDING = 4


class Ending(IntFlag):
    """Why a sequence ends; 0 if it goes on."""

    STOP_TOKEN = 1
    """The last taken token is one."""
    MAX_LEN = 2
    """The history has no room for another token."""
    BAD_LOGITS = 4


def report_size(num_nodes: int, has_logprobs: bool) -> int:
    """Words of a report: the header, and N each of tokens, path and log-probabilities."""
    return HEADER_SIZE + (3 if has_logprobs else 2) * num_nodes


def history_append(
    num_nodes: torch.Tensor,
    depth: torch.Tensor,
    path: torch.Tensor,
    accept_length: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor | None,
    stop_ids: torch.Tensor,
    max_len: torch.Tensor,
    history: torch.Tensor,
    history_len: torch.Tensor,
    roots: torch.Tensor,
    num_path: torch.Tensor,
    report: torch.Tensor,
) -> None:
    """Append the ``accept_length + 1`` tokens that B sequences accepted, and report the round.

    Tokens are taken in order until one is a stop token, which is taken too, or the history holds
    ``max_len`` or T tokens. A sequence that holds as many already takes none. Contents may be
    anything: numbers are clamped, and a ``history_len`` below 0 has no room.

    A row of ``report`` is a header (:class:`ReportWord`), ``tokens``, ``path`` and the bits of
    ``logprobs``; behind the accepted ones, taken or not, -1 and NaN.

    Args:
        num_nodes: ``[B]`` int32, of each tree; reported, 0 to N.
        depth: ``[B, N]`` int32, distances from the root; N is 1 to 128. Reported is the largest
            of the tree's nodes, 0 to N - 1. The last dimension contiguous, as of all.
        path: ``[B, N]`` int32, nodes; reported.
        accept_length: ``[B]`` int32; -1 where logits were bad, which takes none.
        tokens: ``[B, N]`` int32.
        logprobs: ``[B, N]`` float32, or None; reported.
        stop_ids: ``[B, S]`` int32, S any size; negative ones stop nothing.
        max_len: ``[B]`` int32, tokens that each history may hold; written 0 where a sequence ends,
            so that no later round appends to it.
        history: ``[B, T]`` int32, written from ``history_len`` on.
        history_len: ``[B]`` int32, advanced by the tokens taken.
        roots: ``[B]`` int32, written: the last token taken; left alone if none was.
        num_path: ``[B]`` int32, written: the tokens taken, and so the rows of ``path`` that
            ``kv_commit`` takes (the root's, and those of all but the last).
        report: ``[B, report_size(N, has_logprobs)]`` int32, written.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or an input shares memory with an
            output; the argument is named.
    """
    kernel = torch.ops.specrt.history_append if torch.compiler.is_compiling() else _C.history_append
    kernel(
        num_nodes, depth, path, accept_length, tokens, logprobs, stop_ids, max_len, history,
        history_len, roots, num_path, report,
    )  # fmt: skip
