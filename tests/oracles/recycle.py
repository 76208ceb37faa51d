"""Token Recycling's two steps in torch, one sequence at a time (as specrt/ops/token_recycle.py)."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def propose(table: Tensor, root: int, parents: Tensor, ranks: Tensor) -> Tensor:
    """Tokens ``[N]`` of a template's nodes.

    Args:
        table: ``[V, R]``.
        root: the last token.
        parents: ``[N]``, before their children.
        ranks: ``[N]``.
    """
    tokens = [root]
    for parent, rank in zip(parents.tolist()[1:], ranks.tolist()[1:], strict=True):
        tokens.append(int(table[tokens[parent], rank]))
    return torch.tensor(tokens, dtype=torch.int32)


def learn(table: Tensor, is_own: Tensor, logits: Tensor, tokens: Tensor, path: Tensor) -> None:
    """Take what came behind a tree's nodes.

    Args:
        table: ``[V, R]``, written.
        is_own: ``[V]``, written.
        logits: ``[N, V]``, of nodes that count.
        tokens: ``[N]``, theirs.
        path: ``[P]``, accepted nodes.
    """
    ids = logits.topk(min(table.shape), dim=1).indices.int()
    nodes = torch.arange(len(tokens))
    is_accepted = (path[:, None] == nodes).any(dim=0)
    priority = torch.where(is_accepted, nodes + len(tokens), len(tokens) - 1 - nodes)
    is_same = tokens[:, None] == tokens
    counts = ~(is_same & (priority[:, None] < priority)).any(dim=1)
    table[tokens[counts].long(), : ids.shape[1]] = ids[counts]
    is_own[tokens[counts].long()] = 1
