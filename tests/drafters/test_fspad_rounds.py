"""The one-layer drafters over many rounds: pending pairs, pages, restarts, late outcomes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specrt.draft.base import Budget
from specrt.draft.fspad.checkpoint import ARCHS
from specrt.draft.length.costs import RoundCost
from specrt.draft.length.measured import Calibration, MeasuredPolicy
from specrt.models.model import LlamaModel
from specrt.types import AcceptResult, Proposal, SequenceState
from tests.checkpoints import make_checkpoint, make_draft_checkpoint
from tests.drafters.fspad_rig import VOCAB, Rig, budget, make_drafter
from tests.engine.support import make_model
from tests.golden.check import token_paths


@pytest.fixture(scope="module")
def drafters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("drafters")
    for arch in ARCHS:
        make_draft_checkpoint(checkpoint, folder / arch, arch)
    return {arch: folder / arch for arch in ARCHS}


@pytest.fixture
def rig(checkpoint: Path, drafters: dict[str, Path]) -> Rig:
    return make_rig(make_model(checkpoint), drafters["fspad"])


def make_rig(model: LlamaModel, path: Path) -> Rig:
    return Rig(model, make_drafter(model, path), [(7 * i * i) % VOCAB for i in range(250)])


@pytest.mark.parametrize("arch", ARCHS)
def test_a_drafter_after_many_rounds_drafts_as_one_that_begins_afresh(
    checkpoint: Path, drafters: dict[str, Path], arch: str
) -> None:
    """Its cache, positions and pending pairs, with unequal accept lengths in a batch."""
    rig = make_rig(make_model(checkpoint), drafters[arch])
    shape = budget(depth=4, top_k=4, total_tokens=30)
    lengths = [2, 150]
    states = [rig.state(length) for length in lengths]
    for state in states:
        rig.begin(state)
    rng = torch.Generator().manual_seed(0)
    for _ in range(12):
        trees = rig.drafter.propose(states, shape)
        for row, length in enumerate(lengths):
            expected = token_paths(rig.fresh(length, shape))
            assert token_paths(trees, row) == expected
        accepted = torch.randint(0, 6, (2,), generator=rng)
        observe(rig, trees, states, lengths, accepted.tolist())
    for state in states:
        rig.drafter.finish(state)


def observe(
    rig: Rig,
    proposal: Proposal,
    states: list[SequenceState],
    lengths: list[int],
    accepted: list[int],
) -> None:
    """Say that ``accepted`` tokens and a bonus token followed, scattered over the tree's rows."""
    hidden = rig.features.shape[1]
    taps = torch.full((2, 30, hidden), float("nan"))
    path = torch.full((2, 30), -1, dtype=torch.int32)
    tokens = path.clone()
    for row, (length, more) in enumerate(zip(lengths, accepted, strict=True)):
        nodes = [0, 3, 7, 11, 20, 29][: more + 1]
        path[row, : more + 1] = torch.tensor(nodes, dtype=torch.int32)
        taps[row, nodes] = rig.features[length - 1 : length + more]
    result = AcceptResult(path, torch.tensor(accepted, dtype=torch.int32), tokens)
    rig.drafter.observe(states, proposal, result, {"final": taps})
    for row, more in enumerate(accepted):
        states[row].token_ids += rig.ids[lengths[row] : lengths[row] + more + 1]
        lengths[row] += more + 1


def test_many_pending_pairs_are_caught_up(rig: Rig) -> None:
    """Rounds in which nothing is drafted leave their pairs pending."""
    shape, state = budget(depth=3, top_k=3, total_tokens=12), rig.state(4)
    rig.begin(state)
    nothing = budget(total_tokens=1)
    for length in range(4, 190):
        root = rig.drafter.propose([state], nothing if length % 2 else budget(depth=0))
        assert root.num_nodes.tolist() == [1]
        observe_one(rig, root, state, length)
    assert token_paths(rig.drafter.propose([state], shape)) == token_paths(rig.fresh(190, shape))


def observe_one(rig: Rig, proposal: Proposal, state: SequenceState, length: int) -> None:
    zero = torch.zeros(1, 1, dtype=torch.int32)
    result = AcceptResult(zero, zero[0], zero)
    taps = {"final": rig.features[None, length - 1 : length]}
    rig.drafter.observe([state], proposal, result, taps)
    state.token_ids.append(rig.ids[length])


def test_a_sequence_that_needs_a_longer_rotary_table(
    tmp_path: Path, drafters: dict[str, Path]
) -> None:
    """Steps captured over the shorter one are captured anew."""
    make_checkpoint("llama", tmp_path, max_position_embeddings=4096)
    rig = make_rig(make_model(tmp_path), drafters["fspad"])
    drafter = rig.drafter
    drafter._cache.close(drafter._cache.open(4000))  # or pages would move too
    shape, trees = budget(depth=4, top_k=4, total_tokens=24), []
    for num_tokens in (600, 1200, 2400):
        trees.append(rig.fresh(30, shape).draft_tokens.clone())
        before, long = drafter.layer._cos_sin, rig.state(90)
        rig.begin(long)
        drafter._cache.reserve(drafter._drafts[long].cached, num_tokens)
        drafter.propose([long], shape)
        assert len(drafter.layer._cos_sin) > len(before)
        before.fill_(float("nan"))  # nobody may read it any more
        drafter.finish(long)
    for tree in trees[1:]:
        assert torch.equal(tree, trees[0])


def test_pages_are_taken_as_they_are_needed(rig: Rig) -> None:
    cache, state = rig.drafter._cache, rig.state(61)
    rig.begin(state)
    assert cache.num_held_pages == 1  # 59 pairs
    rig.drafter.propose([state], budget(depth=2, top_k=4))  # one more, and four nodes
    assert cache.num_held_pages == 1
    observe_one(rig, rig.drafter.propose([state], budget(depth=0)), state, 61)
    rig.drafter.propose([state], budget(depth=2, top_k=4))
    assert cache.num_held_pages == 2
    rig.drafter.finish(state)
    assert cache.num_held_pages == 0


def test_without_memory_for_pages_nothing_has_changed(rig: Rig) -> None:
    cache, state, shape = rig.drafter._cache, rig.state(64), budget(depth=3, top_k=4)
    cache.pools[0].max_pages = 1
    rig.begin(state)
    with pytest.raises(MemoryError, match="max_pages is 1"):
        rig.drafter.propose([state], shape)
    cache.pools[0].max_pages = None
    tree = token_paths(rig.drafter.propose([state], shape))
    assert tree == token_paths(rig.fresh(64, shape))


def test_restarted_in_mid_output_it_drafts_as_one_that_begins_afresh(rig: Rig) -> None:
    shape, state = budget(depth=4, top_k=4, total_tokens=30), rig.state(20)
    rig.begin(state)
    for length in range(20, 90):
        observe_one(rig, rig.drafter.propose([state], shape), state, length)
    rig.drafter.finish(state)
    rig.begin(state, piece=37)
    assert (state.prompt_len, len(state.token_ids)) == (20, 90)
    assert token_paths(rig.drafter.propose([state], shape)) == token_paths(rig.fresh(90, shape))


def test_outcomes_may_come_a_round_late(checkpoint: Path, drafters: dict[str, Path]) -> None:
    """What was believed of a tree travels with it, though another was drafted since."""
    model, learned = make_model(checkpoint), []
    for is_late in (False, True):
        rig = make_rig(model, drafters["fspad"])
        drafter, states, late = rig.drafter, [rig.state(30), rig.state(70)], []
        for state in states:
            rig.begin(state)
            late.append((state, drafter.propose([state], Budget(64, RoundCost(slope=0.0)))))
            if not is_late:
                observe_one(rig, late[-1][1], state, len(state.token_ids))
        for state, proposal in late if is_late else ():
            observe_one(rig, proposal, state, len(state.token_ids))
        assert all(int(proposal.num_nodes) > 1 for _, proposal in late)
        assert isinstance(drafter._policy, MeasuredPolicy)
        belief = drafter._policy._belief
        assert isinstance(belief, Calibration)
        learned.append(belief._believed.tolist())
    assert learned[0] == learned[1] != Calibration()._believed.tolist()
