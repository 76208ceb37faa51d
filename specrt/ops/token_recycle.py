"""Token Recycling's two steps: a tree read off a table, and what verified rows teach the table.

Shapes: B sequences, S tables of V tokens with R next tokens each, N tree nodes, P path entries.
"""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "recycle_propose(Tensor tables, Tensor slots, Tensor roots, Tensor parents, Tensor ranks, "
    "Tensor(a!) draft_tokens) -> ()",
    _C.recycle_propose,
)
register(
    "recycle_learn(Tensor logits, Tensor draft_tokens, Tensor num_nodes, Tensor path, "
    "Tensor accept_length, Tensor slots, Tensor(a!) tables, Tensor(b!) is_own, "
    "Tensor(c!)? workspace) -> ()",
    _C.recycle_learn,
)


def recycle_learn_workspace(num_rows: int, vocab_size: int, num_ranks: int) -> int:
    """Floats of ``workspace`` that ``recycle_learn`` needs on a GPU.

    It is zero before the first call, and its tickets are zero again after each. One made for the
    largest sizes serves all smaller ones; of two calls at the same time each has its own.

    Args:
        num_rows: B * N.
        vocab_size: V.
        num_ranks: R.
    """
    return _C.recycle_learn_workspace(num_rows, vocab_size, num_ranks)


def recycle_propose(
    tables: torch.Tensor,
    slots: torch.Tensor,
    roots: torch.Tensor,
    parents: torch.Tensor,
    ranks: torch.Tensor,
    draft_tokens: torch.Tensor,
) -> None:
    """Give each node of a template its token: of its parent's next tokens the one of its rank.

    Ids, ranks and parents that are none count as the nearest that is, a parent being one of the
    nodes before; a slot that is none is the last.

    Args:
        tables: ``[S, V, R]`` int32, contiguous: the likeliest tokens behind each, best first; R is
            at most 32.
        slots: ``[B]`` int32: whose table is where.
        roots: ``[B]`` int32: the last tokens.
        parents: ``[N]`` int32, one template for all; the root's is not looked at.
        ranks: ``[N]`` int32, as ``parents``.
        draft_tokens: ``[B, N]`` int32, written; N is 1 to 128, the last dimension contiguous.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    op = torch.ops.specrt.recycle_propose if torch.compiler.is_compiling() else _C.recycle_propose
    op(tables, slots, roots, parents, ranks, draft_tokens)


def recycle_learn(
    logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    num_nodes: torch.Tensor,
    path: torch.Tensor,
    accept_length: torch.Tensor,
    slots: torch.Tensor,
    tables: torch.Tensor,
    is_own: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> None:
    """Write the min(R, V) highest logits' ids of each verified row behind the row's token.

    The highest first; ties go to the lower id, NaN comes last. Of several nodes of one token the
    last one on the path counts; where none is, the first. Tokens that are not in the vocabulary are
    passed over; a slot that is none is the last. No two sequences may have one slot.

    Args:
        logits: ``[B, N, V]`` float32; the last dimension contiguous, as of all.
        draft_tokens: ``[B, N]`` int32; N is 1 to 128.
        num_nodes: ``[B]`` int32: nodes from there on teach nothing.
        path: ``[B, P]`` int32: the accepted nodes, in any order; others are no nodes.
        accept_length: ``[B]`` int32: a sequence teaches nothing where it is below 0.
        slots: ``[B]`` int32: whose table is where.
        tables: ``[S, V, R]`` int32, contiguous, rows written.
        is_own: ``[S, V]`` int32, contiguous: 1 is written for each row that is.
        workspace: on a GPU at least ``[recycle_learn_workspace(B * N, V, R)]`` float32, of zeros
            when it was made; on the CPU not looked at.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    op = torch.ops.specrt.recycle_learn if torch.compiler.is_compiling() else _C.recycle_learn
    op(
        logits, draft_tokens, num_nodes, path, accept_length, slots, tables, is_own, workspace
    )  # fmt: skip
