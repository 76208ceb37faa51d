"""Prompt lookup beside a trained drafter: whose round it is, and how the two are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specrt.cache import KVCache
from specrt.cli.contenders import identity
from specrt.config import ModelConfig
from specrt.draft import kinds
from specrt.draft.base import Budget, DraftParams
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.length.costs import RoundCost
from specrt.draft.prompt_lookup.drafter import Guesses, PromptLookupDrafter
from specrt.draft.with_lookup import RatedDrafter, WithLookup
from specrt.models.model import LlamaModel
from specrt.tree import chain
from specrt.types import AcceptResult, CheckpointError, Proposal, SequenceState
from tests.checkpoints import make_draft_checkpoint, make_exit_checkpoint

REPEATED, NEW = [1, 2, 3, 4, 1, 2, 3], [1, 2, 3, 4, 5, 6, 7]
MARK = 99  # what the stand-in drafts


class Rated:
    """A trained drafter of a known gain that drafts one token."""

    taps = ("final",)

    def __init__(self, gain: float) -> None:
        self.value = gain
        self.told: list[object] = []

    @property
    def cache(self) -> KVCache:
        raise NotImplementedError

    def check(self, params: DraftParams) -> None:
        self.told.append(params)

    def gain(self) -> float:
        return self.value

    def pass_over(self) -> None:
        self.told.append("pass over")

    def start(self, state: SequenceState) -> None:
        self.told.append("start")

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        self.told.append("prefill")

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        rows = [[state.token_ids[-1], MARK] for state in states]
        return chain(torch.tensor(rows, dtype=torch.int32))

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        self.told.append(proposal)

    def finish(self, state: SequenceState) -> None:
        self.told.append("finish")


def sequence(tokens: list[int]) -> SequenceState:
    return SequenceState(list(tokens), len(tokens), 1000, 0, 0.0)


def proposed(
    gain: float, *texts: list[int], slope: float = 0.0, params: DraftParams | None = None
) -> Proposal:
    drafter = WithLookup(Rated(gain), PromptLookupDrafter())
    states = [sequence(text) for text in texts]
    for state in states:
        drafter.start(state)
    return drafter.propose(states, Budget(64, RoundCost(slope), params))


def is_trained(proposal: Proposal) -> bool:
    return proposal.draft_tokens[:, 1].tolist() == [MARK] * len(proposal.draft_tokens)


def test_who_promises_more_proposes() -> None:
    """Half of the tokens behind a match of three are believed in, so that free rows promise 2."""
    assert not is_trained(proposed(1.0, REPEATED))
    assert not is_trained(proposed(1.9, REPEATED))
    assert is_trained(proposed(2.1, REPEATED))
    assert is_trained(proposed(1.0, NEW)), "nothing was found"
    assert is_trained(proposed(1.01, REPEATED, slope=0.49)), "rows are too dear for more than that"


def test_one_proposes_for_all_sequences() -> None:
    found = proposed(1.0, REPEATED, NEW)
    assert found.num_nodes.tolist()[1] == 1 and found.num_nodes.tolist()[0] > 1
    assert not is_trained(proposed(1.4, REPEATED, NEW))
    assert is_trained(proposed(1.6, REPEATED, NEW)), "one of two rows found something"


def test_given_sizes_are_the_trained_drafters() -> None:
    assert is_trained(proposed(1.0, REPEATED, params=DraftParams(depth=1)))


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_the_gain_of_a_find_by_hand(rate: float) -> None:
    drafter, state, cost = PromptLookupDrafter(max_depth=2), sequence(REPEATED), RoundCost(0.1)
    drafter.start(state)
    won = AcceptResult(torch.zeros(1, 1), torch.tensor([2], dtype=torch.int32), torch.zeros(1, 1))
    for _ in range(0 if rate == 0.5 else 60):
        drafter.observe([state], drafter.propose([state], Budget(64, RoundCost(0.0))), won, {})
    found = drafter.propose([state], Budget(64, cost))
    assert isinstance(found, Guesses)
    depth, size = int(found.guesses[0].num_proposed), found.draft_tokens.shape[1]
    chance = found.guesses[0].record.rate
    assert chance == pytest.approx(rate, abs=0.11)
    expected = 1.0 + sum(chance**d for d in range(1, depth + 1))
    assert found.gain(cost) == pytest.approx(expected / (1.0 + 0.1 * (size - 1)))


def test_both_are_told_of_everything() -> None:
    trained, state = Rated(1.0), sequence(REPEATED)
    drafter = WithLookup(trained, PromptLookupDrafter())
    assert drafter.taps == trained.taps
    drafter.check(DraftParams())
    drafter.start(state)
    drafter.prefill(state, 0, {})
    found = drafter.propose([state], Budget(64, RoundCost(0.0)))
    nothing = torch.zeros(1, 1, dtype=torch.int32)
    lost = AcceptResult(nothing, torch.tensor([0], dtype=torch.int32), nothing)
    for _ in range(20):  # in vain, so that it is believed in no longer
        drafter.observe([state], found, lost, {})
    assert trained.told[:4] == [DraftParams(), "start", "prefill", "pass over"]
    assert trained.told[4] is found
    assert is_trained(drafter.propose([state], Budget(64, RoundCost(0.1))))
    drafter.finish(state)
    assert trained.told[-1] == "finish"
    with pytest.raises(KeyError):
        drafter.propose([state], Budget(64, RoundCost(0.0)))


@pytest.mark.parametrize("is_copied", [True, False])
def test_what_is_passed_over_is_held_against_the_text(is_copied: bool) -> None:
    """What copies is soon looked up, however good the other's rounds are; what
    only seems to is not."""
    drafter, state = WithLookup(Rated(4.0), PromptLookupDrafter()), sequence(REPEATED)
    drafter.start(state)
    path = torch.zeros(1, 1, dtype=torch.int32)
    num_passed = 0
    for place in range(40):
        found = drafter.propose([state], Budget(64, RoundCost(0.0)))
        if not is_trained(found):
            break
        num_passed += 1
        token = (4, 1, 2, 3)[place % 4] if is_copied else (50 + place if place % 2 else 1)
        drafter.observe([state], found, AcceptResult(path, path[0], torch.tensor([[token]])), {})
        state.token_ids.append(token)
    assert 2 < num_passed < 20 if is_copied else num_passed == 40


@pytest.mark.parametrize(
    ("said", "accepted", "judged"),
    [
        ([7], 0, 1),  # the first node is wrong
        ([4], 1, 1),  # right, and what lies behind is not known
        ([4, 1], 2, 2),
        ([4, 7], 1, 2),
        ([4, 1, 2], 2, 2),  # more was said than the tree has levels
    ],
)
def test_what_the_text_says_of_a_tree(said: list[int], accepted: int, judged: int) -> None:
    drafter, state = PromptLookupDrafter(max_depth=2), sequence(REPEATED)
    drafter.start(state)
    found = drafter.propose([state], Budget(64, RoundCost(0.0)))
    assert isinstance(found, Guesses) and found.guesses[0] is not None
    assert found.draft_tokens.tolist() == [[3, 4, 1]]
    length = torch.tensor([len(said) - 1], dtype=torch.int32)
    drafter.compare(found, AcceptResult(length[None], length, torch.tensor([said])))
    record = found.guesses[0].record
    assert record.num_accepted == pytest.approx(0.9 + accepted)
    assert record.num_judged == pytest.approx(1.8 + judged)
    drafter.compare(found, AcceptResult(length[None], length - len(said), torch.tensor([said])))
    assert record.num_judged == pytest.approx(1.8 + judged), "its logits were no numbers"


def test_what_is_found_is_proposed_where_the_other_rests_after_all() -> None:
    trained = Rated(9.0)
    drafter, state = WithLookup(trained, PromptLookupDrafter()), sequence(REPEATED)
    drafter.start(state)
    assert is_trained(drafter.propose([state], Budget(64, RoundCost(0.0))))
    trained.propose = lambda states, budget: chain(torch.tensor([[3]], dtype=torch.int32))  # type: ignore[method-assign]
    assert isinstance(drafter.propose([state], Budget(64, RoundCost(0.0))), Guesses)
    assert len(drafter.propose([state], Budget(1, RoundCost(0.0))).draft_tokens[0]) == 1


# --- names ----------------------------------------------------------------------------------------


def load(name: str, target: LlamaModel) -> object:
    return kinds.load_drafter(name, target, None, DrafterOptions())


def test_names(model: LlamaModel, target: Path, tmp_path: Path) -> None:
    make_draft_checkpoint(target, tmp_path / "draft")
    name = f"{tmp_path / 'draft'}+prompt-lookup"
    made = load(name, model)
    assert isinstance(made, WithLookup)
    assert isinstance(load(str(tmp_path / "draft"), model), RatedDrafter)
    config = ModelConfig.from_directory(target)
    assert identity(name, config) != identity(str(tmp_path / "draft"), config)
    # A directory that is called so is itself.
    make_draft_checkpoint(target, tmp_path / "draft+prompt-lookup")
    assert isinstance(load(name, model), FspadDrafter)


@pytest.mark.parametrize("name", ["none", "auto", "", "nobody", "./missing"])
def test_names_of_nobody(model: LlamaModel, name: str) -> None:
    with pytest.raises(CheckpointError, match="drafter|no such|missing"):
        load(f"{name}+prompt-lookup", model)


def test_drafters_that_have_none_beside_them(
    model: LlamaModel, target: Path, tmp_path: Path
) -> None:
    make_exit_checkpoint(target, tmp_path / "exit", 1)
    for name in ("prompt-lookup", "recycle", str(tmp_path / "exit")):
        with pytest.raises(ValueError, match="FSPAD or EAGLE drafter, got"):
            load(f"{name}+prompt-lookup", model)
    on_gpu = SimpleNamespace(device=SimpleNamespace(is_gpu=True))
    with pytest.raises(ValueError, match="on the CPU alone"):
        load("fspad+prompt-lookup", on_gpu)  # type: ignore[arg-type]
