"""Trees built on the host: what every kernel behind them takes for granted."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from specrt.tree import MAX_NODES, TreeBuilder, chain, chain_tree, num_words, stack
from specrt.types import DraftTree
from tests.trees import settled

CHOICES = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 5)), min_size=0, max_size=MAX_NODES - 1
)


def bits(tree: DraftTree, row: int, node: int) -> set[int]:
    """The nodes whose bit is set in a node's ancestor mask."""
    words = [word & 0xFFFFFFFFFFFFFFFF for word in tree.ancestors[row, node].tolist()]
    return {64 * w + j for w, word in enumerate(words) for j in range(64) if word >> j & 1}


def check(tree: DraftTree) -> None:
    """Parents, depth and ancestors agree, and padding is zero."""
    size, num_nodes = tree.draft_tokens.shape
    assert tree.ancestors.shape == (size, num_nodes, num_words(num_nodes))
    assert tree.ancestors.dtype == torch.int64
    for field in (tree.draft_tokens, tree.parents, tree.depth, tree.num_nodes):
        assert field.dtype == torch.int32
    for row, used in enumerate(tree.num_nodes.tolist()):
        parents, depth = tree.parents[row].tolist(), tree.depth[row].tolist()
        assert (parents[0], depth[0], bits(tree, row, 0)) == (-1, 0, {0})
        for node in range(1, used):
            assert 0 <= parents[node] < node
            assert depth[node] == depth[parents[node]] + 1
            assert bits(tree, row, node) == bits(tree, row, parents[node]) | {node}
            assert len(bits(tree, row, node)) == depth[node] + 1
        for field in (tree.draft_tokens, tree.parents, tree.depth, tree.ancestors):
            assert not field[row, used:].any()


def grown(choices: list[tuple[int, int]]) -> TreeBuilder:
    tree = TreeBuilder(9)
    for parent, token in choices:
        tree.add(parent % len(tree), token)
    return tree


@given(st.lists(CHOICES, min_size=1, max_size=3))
def test_stacked_trees_are_well_formed(batch: list[list[tuple[int, int]]]) -> None:
    builders = [grown(choices) for choices in batch]
    tree = settled(stack(builders))
    check(tree)
    assert tree.num_nodes.tolist() == [len(builder) for builder in builders]
    for row, builder in enumerate(builders):
        assert tree.draft_tokens[row, : len(builder)].tolist() == builder.tokens
        # Siblings with one token would be accepted twice.
        edges = list(zip(builder.parents, builder.tokens, strict=True))[1:]
        assert len(set(edges)) == len(edges)


def test_word_boundaries() -> None:
    for size in (1, 63, 64, 65, 127, 128):
        builder = TreeBuilder(0)
        builder.add_path(range(1, size), size)
        assert len(builder) == size
        tree = settled(stack([builder]))
        check(tree)
        assert tree.ancestors.shape[-1] == (1 if size <= 64 else 2)
        assert bits(tree, 0, size - 1) == set(range(size))
    # Bit 63 is an int64's sign.
    assert tree.ancestors[0, 63].tolist() == [-1, 0]
    assert tree.ancestors[0, 64].tolist() == [-1, 1]
    assert tree.ancestors[0, 127].tolist() == [-1, -1]


def test_a_leaf_behind_bit_63_sees_only_its_path() -> None:
    builder = TreeBuilder(0)
    for token in range(1, 127):
        builder.add(0, token)
    builder.add(63, 5)
    tree = settled(stack([builder]))
    check(tree)
    assert bits(tree, 0, 127) == {0, 63, 127}


def test_paths_share_their_prefixes() -> None:
    tree = TreeBuilder(7)
    for path in ([1, 2, 3], [1, 2, 4], [1, 2, 3], [2], [1, 2, 3, 7]):
        tree.add_path(path, 100)
    assert tree.tokens == [7, 1, 2, 3, 4, 2, 7]
    assert tree.parents == [-1, 0, 1, 2, 2, 0, 3]
    check(settled(stack([tree])))


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8), st.integers(1, 12))
def test_max_nodes_cuts_paths_but_not_shared_prefixes(
    paths: list[list[int]], max_nodes: int
) -> None:
    tree = TreeBuilder(0)
    known: set[tuple[int, ...]] = {()}
    for path in paths:
        tree.add_path(path, max_nodes)
        for end in range(1, len(path) + 1):
            if tuple(path[:end]) not in known:
                if len(known) >= max_nodes:
                    break
                known.add(tuple(path[:end]))
    nodes: dict[int, tuple[int, ...]] = {0: ()}
    for node in range(1, len(tree)):
        nodes[node] = (*nodes[tree.parents[node]], tree.tokens[node])
    assert set(nodes.values()) == known
    assert len(tree) == len(known) <= max_nodes


def test_chains_are_stacked_paths() -> None:
    for batch, length in ((1, 1), (3, 1), (2, 64), (1, 65), (2, 128)):
        tokens = torch.arange(batch * length, dtype=torch.int32).view(batch, length)
        tree = chain_tree(tokens)
        check(tree)
        assert tree.draft_tokens is tokens
        assert torch.equal(tree.parents, chain(tokens).parents)
        assert tree.num_nodes.tolist() == [length] * batch


def test_chains_are_their_callers_to_write_to() -> None:
    """Or a drafter that does would change the trees in which prompts are run."""
    for length in (1, 37):
        tokens = torch.zeros(5, length, dtype=torch.int32)
        spoiled = chain(tokens)
        spoiled.parents.fill_(0)
        spoiled.num_nodes.fill_(2)
        tree = chain_tree(tokens)
        check(tree)
        assert tree.num_nodes.tolist() == [length] * 5
        assert tree.depth[0].tolist() == list(range(length))
