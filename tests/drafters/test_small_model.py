"""A small model's drafts against what the model says one token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specrt import ops
from specrt.cache import CacheBatch
from specrt.config import ModelConfig
from specrt.draft.base import Budget, DraftParams
from specrt.draft.length.costs import RoundCost
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.tree import chain_tree
from specrt.types import AcceptResult, Proposal, SequenceState
from tests.checkpoints import make_checkpoint
from tests.trees import settled

VOCAB = 29
CONTEXT = 400
BUDGET = Budget(64, RoundCost())
TEXT = [(5 * i * i + i) % VOCAB for i in range(70)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    path: Path = tmp_path_factory.mktemp("drafter")
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
    make_checkpoint("llama", path, **sizes)
    config = ModelConfig.from_directory(path)
    weights = load_weights(path, config, torch.float32)
    return LlamaModel(config, weights)


def make_state(
    tokens: list[int], num_left: int = 200, seed: int = 0, temperature: float = 0.0
) -> SequenceState:
    return SequenceState(list(tokens), len(tokens), len(tokens) + num_left, seed, temperature)


def started(drafter: SmallModelDrafter, *states: SequenceState) -> list[SequenceState]:
    for state in states:
        drafter.start(state)
    return list(states)


def next_logits(model: LlamaModel, text: list[int]) -> torch.Tensor:
    """Logits ``[V]`` float64 behind a text, in a cache of its own."""
    cache = model.new_cache()
    batch = CacheBatch(cache, [cache.open(len(text) + 1)])
    for _ in model.extend(text[:-1], batch):
        pass
    root = torch.tensor([text[-1:]], dtype=torch.int32)
    return model.forward(chain_tree(root), batch).logits[0, 0].double()


def best_paths(
    model: LlamaModel, text: list[int], depth: int, width: int
) -> list[set[tuple[int, ...]]]:
    """The ``width`` likeliest children of each level's paths, every child looked at."""
    levels, paths = [], {(): 0.0}
    for _ in range(depth):
        children = {}
        for path, score in paths.items():
            scores = next_logits(model, [*text, *path]).log_softmax(-1) + score
            children.update({(*path, token): s for token, s in enumerate(scores.tolist())})
        paths = dict(sorted(children.items(), key=lambda item: -item[1])[:width])
        levels.append(set(paths))
    return levels


def level_paths(proposal: Proposal, row: int = 0) -> list[set[tuple[int, ...]]]:
    """The paths of each level below the root."""
    tree, paths = settled(proposal), list[tuple[int, ...]]([()])
    for node in range(1, int(tree.num_nodes[row])):
        above = paths[int(tree.parents[row, node])]
        paths.append((*above, int(tree.draft_tokens[row, node])))
    assert len(set(paths)) == len(paths)
    deepest = max(map(len, paths))
    return [{path for path in paths if len(path) == depth} for depth in range(1, deepest + 1)]


@pytest.mark.parametrize(("depth", "width"), [(1, 1), (5, 1), (1, 6), (4, 3), (3, 9)])
def test_trees_hold_the_likeliest_paths(model: LlamaModel, depth: int, width: int) -> None:
    drafter = SmallModelDrafter(model, depth, width)
    for size in (1, 2, 63, 64, 70):
        (state,) = started(drafter, make_state(TEXT[:size]))
        tree = drafter.propose([state], BUDGET)
        assert int(tree.draft_tokens[0, 0]) == TEXT[size - 1]
        assert level_paths(tree) == best_paths(model, TEXT[:size], depth, width)
        drafter.finish(state)
    assert drafter._cache.num_free_pages == drafter._cache.num_pages


def test_rejected_trees_leave_no_trace(model: LlamaModel) -> None:
    """After any mix of accepted lengths a drafter proposes what a fresh one would."""
    drafter = SmallModelDrafter(model, 3, 3)
    (state,) = started(drafter, make_state(TEXT[:20]))
    nothing = torch.zeros(1, 1, dtype=torch.int32)
    # One right and one wrong token, none right, the whole path, several at once.
    for accepted, more in ((1, [7]), (0, [3]), (3, [4]), (2, [1, 2, 3, 4, 5, 6]), (0, [28])):
        tree = drafter.propose([state], BUDGET)
        assert drafter._cached[state].length == len(state.token_ids)  # the root is run once
        fresh = SmallModelDrafter(model, 3, 3)
        started(fresh, other := make_state(state.token_ids))
        expected = fresh.propose([other], BUDGET)
        for name in ("draft_tokens", "parents"):
            assert torch.equal(getattr(tree, name), getattr(expected, name))
        lengths = torch.tensor([accepted], dtype=torch.int32)
        drafter.observe([state], tree, AcceptResult(nothing, lengths, nothing), {})
        path = max(level_paths(tree)[-1])
        state.token_ids += [*path[:accepted], *more]


def test_asked_again_it_proposes_the_same(model: LlamaModel) -> None:
    drafter = SmallModelDrafter(model, 3, 3)
    states = started(drafter, make_state(TEXT * 3), make_state(TEXT[:9]))
    first = drafter.propose(states, BUDGET)
    again = drafter.propose(states, BUDGET)
    assert torch.equal(first.draft_tokens, again.draft_tokens)
    assert torch.equal(first.parents, again.parents)


def test_sequences_of_unequal_lengths_draft_as_if_alone(model: LlamaModel) -> None:
    drafter = SmallModelDrafter(model, 3, 4)
    states = started(drafter, *(make_state(TEXT[:size]) for size in (1, 33, 64, 65)))
    for more in (1, 4, 2):
        tree = drafter.propose(states, BUDGET)
        for row, state in enumerate(states):
            assert level_paths(tree, row) == best_paths(model, state.token_ids, 3, 4)
            state.token_ids += TEXT[row : row + (more + row) % 4 + 1]
    # Leaving and joining do not mix rows up.
    drafter.finish(states.pop(1))
    states += started(drafter, make_state(TEXT[30:50]))
    tree = drafter.propose(states[::-1], BUDGET)
    for row, state in enumerate(states[::-1]):
        assert level_paths(tree, row) == best_paths(model, state.token_ids, 3, 4)


def test_limits(model: LlamaModel) -> None:
    def size(num_left: int, max_nodes: int, depth: int = 4, width: int = 3, **asked: int) -> int:
        drafter = SmallModelDrafter(model, depth, width)
        states = started(drafter, make_state(TEXT[:9], num_left))
        budget = Budget(max_nodes, RoundCost(), DraftParams(**asked))
        return drafter.propose(states, budget).draft_tokens.shape[1]

    assert size(100, 64) == 13
    assert size(100, 12) == 10
    assert size(100, 3) == 3
    assert size(100, 1) == size(100, 64, total_tokens=1) == 1
    assert size(100, 9, total_tokens=12) == size(100, 64, total_tokens=9) == 7
    # The last token that may come is the bonus token.
    assert size(3, 64) == size(3, 64, depth=9) == 7
    assert size(1, 64) == 1
    assert size(100, 128, depth=100, width=5) == 126


@pytest.mark.parametrize(
    ("asked", "depth", "width"),
    [
        (DraftParams(depth=2), 2, 3),
        (DraftParams(top_k=1), 4, 1),
        (DraftParams(depth=12, top_k=10), 12, 10),  # more nodes than fit a word of ancestor bits
        (DraftParams(depth=3, top_k=4, total_tokens=11), 2, 4),
    ],
)
def test_draft_params_are_honoured(
    model: LlamaModel, asked: DraftParams, depth: int, width: int
) -> None:
    drafter = SmallModelDrafter(model, 4, 3)
    drafter.check(asked)
    states = started(drafter, make_state(TEXT[:9]), make_state(TEXT[:30]))
    trees = drafter.propose(states, Budget(128, RoundCost(), asked))
    for row, state in enumerate(states):
        assert level_paths(trees, row) == best_paths(model, state.token_ids, depth, width)
    nothing = Budget(128, RoundCost(), DraftParams(depth=0))
    assert drafter.propose(states, nothing).num_nodes.tolist() == [1, 1]


def test_trees_it_cannot_draft_are_refused(model: LlamaModel) -> None:
    drafter, chains = SmallModelDrafter(model), SmallModelDrafter(model, is_sampled=True)
    for asked in (DraftParams(top_k=1), DraftParams(depth=9, total_tokens=3)):
        chains.check(asked)
    with pytest.raises(ValueError, match="top_k: expected 1 for sampled drafts, got 2"):
        chains.check(DraftParams(top_k=2))
    drafter.check(DraftParams(top_k=VOCAB))
    with pytest.raises(ValueError, match="top_k: expected at most the shared vocabulary 29, got 3"):
        drafter.check(DraftParams(top_k=VOCAB + 1))


def test_beyond_its_context_it_proposes_nothing(model: LlamaModel) -> None:
    drafter = SmallModelDrafter(model, 4)
    text = (TEXT * 7)[: CONTEXT + 30]
    for length, depth in ((CONTEXT - 5, 4), (CONTEXT - 2, 2), (CONTEXT, 0), (CONTEXT + 30, 0)):
        (state,) = started(drafter, make_state(text[:length]))
        tree = drafter.propose([state], BUDGET)
        assert tree.draft_tokens.shape[1] == depth + 1
        if depth:
            assert level_paths(tree) == best_paths(model, text[:length], depth, 1)
        drafter.finish(state)


@pytest.mark.parametrize("is_sampled", [False, True])
def test_a_neighbour_beyond_the_context_keeps_nobody_from_drafting(
    model: LlamaModel, is_sampled: bool
) -> None:
    drafter = SmallModelDrafter(model, 3, is_sampled=is_sampled)
    long, short = started(drafter, make_state((TEXT * 7)[:CONTEXT]), make_state(TEXT[:5], 390))
    trees, alone = drafter.propose([long, short], BUDGET), drafter.propose([short], BUDGET)
    assert trees.num_nodes.tolist() == [1, 4]
    assert trees.draft_tokens[0, 0] == long.token_ids[-1]
    assert torch.equal(trees.draft_tokens[1], alone.draft_tokens[0])
    assert torch.equal(trees.parents[1], alone.parents[0])
    assert (trees.draft_probs is None) == (alone.draft_probs is None) == (not is_sampled)
    if trees.draft_probs is not None and alone.draft_probs is not None:
        assert torch.equal(trees.draft_probs[1], alone.draft_probs[0])


def test_catching_up_after_a_long_silence(model: LlamaModel) -> None:
    drafter, nothing = SmallModelDrafter(model, 3, 2), Budget(1, RoundCost())
    (state,) = started(drafter, make_state(TEXT[:5], 390))
    state.token_ids += TEXT * 3
    assert drafter.propose([state], nothing).draft_tokens.shape[1] == 1
    assert level_paths(drafter.propose([state], BUDGET)) == best_paths(model, state.token_ids, 3, 2)


def test_prompts_are_run_beside_the_target_and_again_after_a_restart(model: LlamaModel) -> None:
    drafter, text = SmallModelDrafter(model, 3, 2), TEXT * 5
    state = make_state(text[:300])
    for length in (300, 345):  # it gave way in mid-output, and comes back longer
        (state,) = started(drafter, state)
        for start in range(0, length - 1, 128):
            drafter.prefill(state, start, {})
            assert drafter._cached[state].length == min(start + 128, length - 1)
        assert level_paths(drafter.propose([state], BUDGET)) == best_paths(
            model, state.token_ids, 3, 2
        )
        drafter.finish(state)
        state.token_ids += text[length : length + 45]


def test_pages_are_taken_as_they_are_needed(model: LlamaModel) -> None:
    drafter = SmallModelDrafter(model, 3, 2)
    (state,) = started(drafter, make_state(TEXT[:60], 300))
    assert drafter._cache.num_held_pages == 0
    drafter.propose([state], BUDGET)  # rows of 60 tokens, and of two of the three levels
    assert drafter._cache.num_held_pages == 1
    state.token_ids.append(7)
    drafter.propose([state], BUDGET)
    assert drafter._cache.num_held_pages == 2
    drafter.finish(state)
    assert drafter._cache.num_held_pages == 0


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_sampled_chains_hand_over_their_laws(model: LlamaModel, temperature: float) -> None:
    drafter = SmallModelDrafter(model, 3, is_sampled=True)
    states = started(
        drafter, *(make_state(TEXT[: 5 + seed], 200, seed, temperature) for seed in range(6))
    )
    tree = drafter.propose(states, BUDGET)
    assert tree.draft_probs is not None
    assert tree.draft_probs.shape == (6, 4, VOCAB)
    for row, state in enumerate(states):
        drafted = tree.draft_tokens[row, 1:].tolist()
        for node, token in enumerate(drafted):
            law = tree.draft_probs[row, node].double()
            logits = next_logits(model, [*state.token_ids, *drafted[:node]])
            if temperature:
                expected = (logits / temperature).softmax(-1)
            else:
                expected = torch.nn.functional.one_hot(logits.argmax(), VOCAB).double()
            torch.testing.assert_close(law, expected, rtol=1e-5, atol=1e-7)
            position = len(state.token_ids) + node
            noise = ops.gumbel_noise(state.seed, position, VOCAB, ops.Purpose.DRAFT)
            assert token == int((tree.draft_probs[row, node].log() + noise).argmax())


def test_drafts_are_drawn_from_their_law(model: LlamaModel) -> None:
    num_seeds = 200
    drafter = SmallModelDrafter(model, 1, is_sampled=True)
    states = started(drafter, *(make_state(TEXT[:5], 9, s, 1.0) for s in range(num_seeds)))
    counts = torch.zeros(VOCAB, dtype=torch.float64)
    for start in range(0, num_seeds, 50):
        tree = drafter.propose(states[start : start + 50], BUDGET)
        counts += torch.bincount(tree.draft_tokens[:, 1].long(), minlength=VOCAB)
    law = next_logits(model, TEXT[:5]).softmax(-1)
    expected = law * num_seeds
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Chi-square with 28 degrees of freedom: 70 is passed by chance once in 50,000; seeds are fixed.
    assert statistic < 70


@pytest.mark.parametrize(
    "options", [{"depth": 0}, {"width": 0}, {"width": 2, "is_sampled": True}, {"width": VOCAB + 1}]
)
def test_options_out_of_range(model: LlamaModel, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SmallModelDrafter(model, **options)
