"""What of a drafter's tree is believed, and what follows from it: root, depth, ancestors."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "tree_settle(Tensor draft_tokens, Tensor parents, Tensor num_nodes, Tensor roots, "
    "Tensor max_nodes, int vocab_size, Tensor(a!) settled_tokens, Tensor(b!) settled_parents, "
    "Tensor(c!) depth, Tensor(d!) ancestors, Tensor(e!) num_settled) -> ()",
    _C.tree_settle,
)


def tree_settle(
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    roots: torch.Tensor,
    max_nodes: torch.Tensor,
    vocab_size: int,
    settled_tokens: torch.Tensor,
    settled_parents: torch.Tensor,
    depth: torch.Tensor,
    ancestors: torch.Tensor,
    num_settled: torch.Tensor,
) -> None:
    """Make trees of B drafts, whatever they hold; every element of the outputs is written.

    Node 0 is the root, whatever the draft has there. Node ``i >= 1`` is kept while ``i`` is below
    ``num_nodes``, ``max_nodes``, M and N, its parent is one of the nodes before it and its token is
    in the vocabulary; the first that is not ends the tree. Behind it all is 0.

    Args:
        draft_tokens: ``[B, M]`` int32, M any size; the last dimension contiguous, as of all.
        parents: ``[B, M]`` int32.
        num_nodes: ``[B]`` int32, what the drafter says; any value.
        roots: ``[B]`` int32, the last committed tokens.
        max_nodes: ``[B]`` int32, of each sequence, its root included; below 1 counts as 1.
        vocab_size: V; token ids are 0 to V - 1.
        settled_tokens: ``[B, N]`` int32, written; N is 1 to 128.
        settled_parents: ``[B, N]`` int32, written; the root's is -1.
        depth: ``[B, N]`` int32, written: distance from the root.
        ancestors: ``[B, N, W]`` int64 holding unsigned bits, written: bit j of row i means node j
            is i or above it. W is 1 (N at most 64) or 2.
        num_settled: ``[B]`` int32, written: 1 to N.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or an input shares memory with an
            output; the argument is named.
    """
    kernel = torch.ops.specrt.tree_settle if torch.compiler.is_compiling() else _C.tree_settle
    kernel(
        draft_tokens, parents, num_nodes, roots, max_nodes, vocab_size, settled_tokens,
        settled_parents, depth, ancestors, num_settled,
    )  # fmt: skip
