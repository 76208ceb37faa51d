"""Prompt lookup: what it finds, in which order, and when it holds its tongue."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specrt.draft.base import Budget, DraftParams
from specrt.draft.length.costs import RoundCost
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.tree import TreeBuilder
from specrt.types import AcceptResult, Proposal, SequenceState
from tests.trees import settled

FREE = RoundCost(slope=0.0)


def make_state(tokens: list[int], num_left: int = 1000) -> SequenceState:
    return SequenceState(list(tokens), len(tokens), len(tokens) + num_left, 0, 0.0)


def propose(
    tokens: list[int], max_nodes: int = 64, num_left: int = 1000, **options: int
) -> Proposal:
    drafter, state = PromptLookupDrafter(**options), make_state(tokens, num_left)
    drafter.start(state)
    return drafter.propose([state], Budget(max_nodes, FREE))


def drafted(tree: Proposal, row: int = 0) -> list[int]:
    return tree.draft_tokens[row, 1 : int(tree.num_nodes[row])].tolist()


def verdict(*lengths: int) -> AcceptResult:
    """What acceptance says; lookup reads the accepted lengths alone."""
    nothing = torch.zeros(len(lengths), 1, dtype=torch.int32)
    return AcceptResult(nothing, torch.tensor(lengths, dtype=torch.int32), nothing)


def test_the_longest_match_wins() -> None:
    # [2, 3] occurred once; 3 alone later, followed by 9.
    assert drafted(propose([1, 2, 3, 7, 3, 9, 2, 3], max_depth=1)) == [7]
    assert drafted(propose([1, 2, 3, 7, 3, 9, 2, 3], max_depth=1, max_ngram=1)) == [9]


def test_the_most_recent_continuation_comes_first() -> None:
    text = [5, 1, 5, 2, 5, 3, 5, 4, 5]
    assert drafted(propose(text, max_depth=1, num_continuations=1)) == [4]
    assert drafted(propose(text, max_depth=2, num_continuations=1)) == [4, 5]


def test_continuations_share_their_prefix() -> None:
    text = [8, 9, 1, 2, 3, 0, 8, 9, 1, 8, 9]
    tree = propose(text, max_ngram=2, max_depth=6)
    expected = TreeBuilder(9)
    # The most recent one runs into the end of the text and goes on as if it repeated.
    for path in ([1, 8, 9, 1, 8, 9], [1, 2, 3, 0, 8, 9]):
        expected.add_path(path, 10)
    assert tree.draft_tokens[0].tolist() == expected.tokens
    assert tree.parents[0].tolist() == expected.parents
    assert expected.parents.count(1) == 2


def test_nothing_known_nothing_proposed() -> None:
    for text in ([1], [1, 2, 3], [1, 1, 2]):
        assert drafted(propose(text)) == []
    assert drafted(propose([1, 2, 1], min_ngram=2)) == []


def test_limits() -> None:
    text = [*range(1, 30), 1, 2]
    assert drafted(propose(text)) == list(range(3, 18))
    assert len(drafted(propose(text, max_nodes=5))) == 4
    assert drafted(propose(text, max_nodes=1)) == []
    assert len(drafted(propose(text, max_depth=3))) == 3
    # The last token that may come is the bonus token.
    assert len(drafted(propose(text, num_left=3))) == 2
    assert drafted(propose(text, num_left=1)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"min_ngram": 0},
        {"min_ngram": 5, "max_ngram": 4},
        {"max_depth": 0},
        {"num_continuations": 0},
    ],
)
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        PromptLookupDrafter(**options)


def searched(tokens: list[int], max_ngram: int, num: int, depth: int) -> set[tuple[int, ...]]:
    """Every prefix of the continuations, by looking at every place in the text."""
    for size in range(min(max_ngram, len(tokens) - 1), 0, -1):
        ends = [
            end
            for end in range(len(tokens) - 1, size - 1, -1)
            if tokens[end - size : end] == tokens[-size:]
        ]
        if ends:
            break
    else:
        return {()}
    known: set[tuple[int, ...]] = {()}
    for end in ends[:num]:
        path = (tokens[end:] * depth)[:depth]
        for stop in range(1, len(path) + 1):
            if tuple(path[:stop]) not in known and len(known) > depth + depth // 2:
                break
            known.add(tuple(path[:stop]))
    return known


def node_paths(tree: Proposal, row: int) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, int(tree.num_nodes[row])):
        parent = int(tree.parents[row, node])
        paths.append((*paths[parent], int(tree.draft_tokens[row, node])))
    return set(paths)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=2, max_size=15),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_the_index_is_right_over_many_rounds(
    rounds: list[list[int]], max_ngram: int, num_continuations: int
) -> None:
    drafter = PromptLookupDrafter(
        max_ngram=max_ngram, max_depth=6, num_continuations=num_continuations
    )
    states = [make_state(rounds[0]), make_state([1, *rounds[-1]])]
    for state in states:
        drafter.start(state)
    for said in rounds[1:]:
        tree = drafter.propose(states, Budget(64, FREE))
        for row, state in enumerate(states):
            expected = searched(state.token_ids, max_ngram, num_continuations, 6)
            assert node_paths(tree, row) == expected
        deepest = [int(settled(tree).depth[row].max()) for row in range(2)]
        drafter.observe(states, tree, verdict(*deepest), {})
        states[0].token_ids += said
        states[1].token_ids += said[:1]


def shaped(**fields: int) -> Proposal:
    """Of a text whose 9 was followed by four different continuations."""
    text = [9, 1, 2, 3, 4, 9, 5, 6, 7, 8, 9, 1, 2, 7, 7, 9, 3, 3, 3, 3, 9]
    drafter, state = PromptLookupDrafter(max_depth=4), make_state(text)
    drafter.start(state)
    dear = RoundCost(slope=1.0)
    assert drafted(drafter.propose([state], Budget(64, dear))) == []  # and it takes a rest
    return drafter.propose([state], Budget(64, dear, DraftParams(**fields)))


def test_draft_params_fix_the_size_whatever_rows_cost() -> None:
    first, second, third, last = (3, 3, 3, 3), (1, 2, 7, 7), (5, 6, 7, 8), (1, 2, 3, 4)

    def paths(*continuations: tuple[int, ...]) -> set[tuple[int, ...]]:
        return {path[:stop] for path in continuations for stop in range(len(path) + 1)}

    assert node_paths(shaped(depth=2), 0) == paths(first[:2], second[:2], third[:2])
    assert node_paths(shaped(top_k=1), 0) == paths(first)
    assert node_paths(shaped(top_k=100), 0) == paths(first, second, third, last)
    assert node_paths(shaped(total_tokens=7), 0) == paths(first, second[:2])
    assert node_paths(shaped(depth=3, top_k=2, total_tokens=6), 0) == paths(first[:3], second[:2])
    assert drafted(shaped(depth=0)) == drafted(shaped(total_tokens=1)) == []
    assert len(drafted(shaped(depth=20, top_k=1))) == 20


def test_outcomes_of_given_sizes_teach_nothing() -> None:
    drafter, state = PromptLookupDrafter(), make_state([1, 2, 3] * 5)
    drafter.start(state)
    for _ in range(20):
        proposal = drafter.propose([state], Budget(64, FREE, DraftParams(depth=4)))
        drafter.observe([state], proposal, verdict(0), {})
    cost = RoundCost(slope=0.3)
    fresh, other = PromptLookupDrafter(), make_state(state.token_ids)
    fresh.start(other)
    expected = drafted(fresh.propose([other], Budget(64, cost)))
    assert expected and drafted(drafter.propose([state], Budget(64, cost))) == expected


def test_outcomes_may_come_a_round_late() -> None:
    """Each is written to the match that was proposed, though others were looked up since."""

    def rates(is_late: bool) -> list[float]:
        drafter = PromptLookupDrafter(max_ngram=2)
        states = [make_state([1, 2, 3] * 4), make_state([4, 5, 4, 6, 4])]
        proposals: list[Proposal] = []
        for state, length in zip(states, (3, 0), strict=True):
            drafter.start(state)
            proposals.append(drafter.propose([state], Budget(64, FREE)))
            if not is_late:
                drafter.observe([state], proposals[-1], verdict(length), {})
        if is_late:
            for state, proposal, length in zip(states, proposals, (3, 0), strict=True):
                drafter.observe([state], proposal, verdict(length), {})
        assert all(map(drafted, proposals))
        return [drafter._overall[match].rate for match in (1, 2)]

    late = rates(is_late=True)
    assert late == rates(is_late=False)
    assert late[0] < 0.5 < late[1] < 1.0


def test_restarted_in_mid_output_it_proposes_the_same() -> None:
    state = make_state([1, 2, 3, 4, 5])
    drafter = PromptLookupDrafter()
    drafter.start(state)
    drafter.propose([state], Budget(64, FREE))
    state.token_ids += [2, 3, 9, 2, 3]
    expected = drafted(drafter.propose([state], Budget(64, FREE)))
    drafter.finish(state)
    drafter.start(state)
    assert drafted(drafter.propose([state], Budget(64, FREE))) == expected
    assert expected[:4] == [9, 2, 3, 9]


def failures_until_silence(cost: RoundCost, limit: int = 50) -> tuple[int, PromptLookupDrafter]:
    drafter, state = PromptLookupDrafter(), make_state([1, 2, 3] * 20)
    drafter.start(state)
    for count in range(limit):
        tree = drafter.propose([state], Budget(64, cost))
        if not drafted(tree):
            return count, drafter
        drafter.observe([state], tree, verdict(0), {})
        state.token_ids.append(state.token_ids[-3])
    return limit, drafter


def test_it_backs_off_where_rows_are_dear() -> None:
    count, _ = failures_until_silence(RoundCost(slope=0.3))
    assert 1 <= count <= 5
    # Rows that cost nothing are always worth a try.
    assert failures_until_silence(FREE)[0] == 50


def test_it_comes_back() -> None:
    cost = RoundCost(slope=0.3)
    _, drafter = failures_until_silence(cost)
    (state,) = drafter._lookups
    silent = 0
    while not drafted(tree := drafter.propose([state], Budget(64, cost))):
        drafter.observe([state], tree, verdict(0), {})
        state.token_ids.append(state.token_ids[-3])
        silent += 1
        assert silent < 200
    assert silent > 5
    # Once right again, proposals grow.
    sizes = []
    for _ in range(20):
        tree = drafter.propose([state], Budget(64, cost))
        sizes.append(len(drafted(tree)))
        drafter.observe([state], tree, verdict(sizes[-1]), {})
        state.token_ids += drafted(tree)
        state.token_ids.append(state.token_ids[-3])
    assert all(sizes) and sizes[-1] > sizes[0]


def test_a_failed_sequence_teaches_nothing_and_leaves() -> None:
    drafter, state = PromptLookupDrafter(), make_state([1, 2] * 5)
    drafter.start(state)
    tree = drafter.propose([state], Budget(64, RoundCost()))
    before = drafted(tree)
    drafter.observe([state], tree, verdict(-1), {})
    assert drafted(drafter.propose([state], Budget(64, RoundCost()))) == before
    drafter.finish(state)
    drafter.finish(state)
    assert not drafter._lookups


# --- the cost of rows -----------------------------------------------------------------------------


def measured(rounds: int = 200, **ms: float) -> RoundCost:
    cost = RoundCost(slope=0.1)
    for _ in range(rounds):
        for rows, time in ms.items():
            cost.observe(int(rows[1:]), time)
    return cost


def test_before_measurements_the_prior_holds() -> None:
    cost = RoundCost(slope=0.1)
    assert [cost.relative(n) for n in (0, 1, 2, 11)] == pytest.approx([1, 1, 1.1, 2])
    # Rounds of one size say nothing of the slope.
    assert measured(n8=99.0).relative(8) == pytest.approx(1.7)


def test_measured_costs_become_a_line() -> None:
    cost = measured(n1=2.0, n5=4.0, n9=6.0)
    for rows in (2, 3, 5, 9, 17):
        assert cost.relative(rows) == pytest.approx(1 + 0.25 * (rows - 1), rel=1e-2), rows
    # More rows never count as cheaper than one.
    assert measured(n1=2.0, n5=1.0).relative(5) == pytest.approx(1.0, abs=1e-3)


def test_the_first_round_of_a_size_does_not_count() -> None:
    cost = measured(n1=1.0)
    cost.observe(4, 1000.0)
    assert cost.relative(4) == pytest.approx(1.3)
    cost.observe(4, 1.9)
    assert cost.relative(4) > 1.3


def test_outliers_are_capped_but_change_is_learned() -> None:
    cost = measured(n1=1.0, n4=1.3)
    before = cost.relative(4)
    cost.observe(4, 1000.0)
    assert before < cost.relative(4) < 1.1 * before
    cost.observe(1, 1000.0)
    assert cost.relative(4) < 1.1 * before
    for _ in range(200):
        cost.observe(1, 1.0)
        cost.observe(4, 3.0)
    assert cost.relative(4) == pytest.approx(3.0, rel=5e-2)
