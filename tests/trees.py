"""What the engine would make of a proposal, for tests of drafters and models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specrt.tree import MAX_NODES, TreeBuilder, settle, stack
from specrt.types import DraftTree, Proposal


def settled(proposal: Proposal) -> DraftTree:
    """The proposal's trees, their roots believed; nothing else of it may have to be cut."""
    batch = len(proposal.num_nodes)
    room = torch.full((batch,), MAX_NODES, dtype=torch.int32)
    tree = settle(proposal, proposal.draft_tokens[:, 0].contiguous(), room, 2**31 - 1)
    assert torch.equal(tree.num_nodes, proposal.num_nodes), "what was proposed is no tree"
    return tree


def trees_of(builders: Sequence[TreeBuilder]) -> DraftTree:
    """One of B sequences from one builder each."""
    return settled(stack(builders))
