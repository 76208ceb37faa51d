"""Draft trees out of each sequence's own history."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "prompt_lookup(Tensor history, Tensor history_len, Tensor max_len, int max_ngram, "
    "int min_ngram, int num_continuations, int depth, Tensor(a!) draft_tokens, Tensor(b!) parents, "
    "Tensor(c!) num_nodes, Tensor(d!) match_len, Tensor(e!) longest) -> ()",
    _C.prompt_lookup,
)


def prompt_lookup(
    history: torch.Tensor,
    history_len: torch.Tensor,
    max_len: torch.Tensor,
    max_ngram: int,
    min_ngram: int,
    num_continuations: int,
    depth: int,
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    match_len: torch.Tensor,
    longest: torch.Tensor,
) -> None:
    """Draft what followed the longest suffix of each of B histories where it occurred before.

    Of the longest suffix of ``min_ngram`` to ``max_ngram`` tokens that also ends before the
    history's last token, the ``num_continuations`` most recent occurrences count. What followed
    each, ``depth`` tokens of it, is a path below the root, the most recent one first; one that runs
    into the history's end goes on as if it repeated. Paths share nodes where they agree, and a path
    ends before the first node that would be more than M. So the tree for a smaller M is the
    beginning of that for a larger one.

    Contents may be anything: ``history_len`` is clamped to 0..T, and tokens are only compared.

    Args:
        history: ``[B, T]`` int32; the last dimension contiguous, as of all.
        history_len: ``[B]`` int32: tokens that each history holds.
        max_len: ``[B]`` int32: how long a history may become. Continuations are no longer than
            ``max_len - history_len - 1``; where that is nothing, nothing is looked for.
        max_ngram: longest suffix that is looked up.
        min_ngram: shortest suffix, at least 1.
        num_continuations: 1 to 128.
        depth: of a continuation, at most.
        draft_tokens: ``[B, M]`` int32, written; M is 1 to 128. Node 0 is the history's last token
            (0 if it has none), nodes from ``num_nodes`` on are 0.
        parents: ``[B, M]`` int32, written; the root's is -1.
        num_nodes: ``[B]`` int32, written: 1 to M; 1 where nothing was found.
        match_len: ``[B]`` int32, written: tokens of the suffix; 0 where nothing was found.
        longest: ``[B]`` int32, written: tokens of the longest continuation that are in the tree.

    Raises:
        ValueError: a shape, dtype, stride, device or number does not fit, or an input shares memory
            with an output; the argument is named.
    """
    kernel = torch.ops.specrt.prompt_lookup if torch.compiler.is_compiling() else _C.prompt_lookup
    kernel(
        history, history_len, max_len, max_ngram, min_ngram, num_continuations, depth, draft_tokens,
        parents, num_nodes, match_len, longest,
    )  # fmt: skip
