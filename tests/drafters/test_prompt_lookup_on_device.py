"""Prompt lookup by launches alone, on a GPU, simulated or real: the host's trees, whatever the
round, and widths by what came of earlier ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specrt.device import Device
from specrt.draft.base import (
    BatchTables,
    Budget,
    DraftParams,
    LaunchedDrafter,
    RoundPlan,
    StageTimes,
)
from specrt.draft.length.costs import GPU_SLOPE, RoundCost
from specrt.draft.length.envelope import GPU_ENVELOPES
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.prompt_lookup.on_device import DevicePromptLookupDrafter, WidthPolicy
from specrt.types import Proposal, RoundReport, SequenceState

SLOTS, NODES = 80, 64
Tree = tuple[list[int], list[int]]
"""Tokens and parents."""


class NothingOfTorchs(TorchDispatchMode):
    """Only ops of our own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: in a round of launches alone")


def sequences(count: int, seed: int = 0) -> list[SequenceState]:
    """Of few different tokens, some of them near their end."""
    rng, states = random.Random(seed), []
    for _ in range(count):
        length = rng.choice((1, 2, 30, 60))
        tokens = [rng.randrange(3) for _ in range(length)]
        states.append(SequenceState(tokens, length, length + rng.choice((1, 2, 9, 20)), 0, 0.0))
    return states


def blank_report(batch: int, size: int) -> RoundReport:
    """Nobody's."""
    ones, path = np.zeros((3, batch), dtype=np.int32), np.full((batch, size), -1, dtype=np.int32)
    return RoundReport(*ones, path)


def trees_of(gpu: Device, proposal: Proposal) -> list[Tree]:
    fields = proposal.draft_tokens, proposal.parents, proposal.num_nodes
    tokens, parents, counts = (gpu.read(field).tolist() for field in fields)
    return [(t[:n], p[:n]) for t, p, n in zip(tokens, parents, counts, strict=True)]


@dataclass
class Rounds:
    """Rounds of a batch, each held against the host's trees for the same texts."""

    gpu: Device
    drafter: DevicePromptLookupDrafter
    states: list[SequenceState]
    budget: Budget
    depth: int = 15
    num_continuations: int = 3

    def __post_init__(self) -> None:
        self.rng = random.Random(1)
        self.ended = [False] * len(self.states)

    def one(self) -> tuple[RoundPlan, list[Tree]]:
        """Plan, launch, compare; some of a path is accepted."""
        plan, tables = self.drafter.plan(self.states, self.budget), self.tables()
        with NothingOfTorchs():
            proposal = self.drafter.launch_propose(plan, tables)
        trees = trees_of(self.gpu, proposal)
        assert proposal.draft_tokens.shape == (len(self.states), plan.num_nodes)
        if plan.num_nodes > 1:
            assert trees == [self.expected(row, plan.num_nodes) for row in range(len(trees))]
        self.accept(plan, trees)
        return plan, trees

    def tables(self) -> BatchTables:
        """What was accepted so far; slots behind it hold anything."""

        def there(values: list[Any]) -> torch.Tensor:
            return self.gpu.there(torch.tensor(values, dtype=torch.int32))

        texts = [state.token_ids for state in self.states]
        most = [0 if e else s.max_len for e, s in zip(self.ended, self.states, strict=True)]
        unread: Any = None
        return BatchTables(
            there([text + [1] * (SLOTS - len(text)) for text in texts]),
            there(list(map(len, texts))),
            there(most),
            there([text[-1] for text in texts]),
            *[unread] * 5,
        )

    def expected(self, row: int, size: int) -> Tree:
        """The host's, of so many nodes at most; of one that has ended, nothing."""
        state, host = self.states[row], PromptLookupDrafter()
        if self.ended[row]:
            return state.token_ids[-1:], [-1]
        host.start(state)
        shape = DraftParams(self.depth, self.num_continuations, size)
        tree = host.propose([state], Budget(NODES, RoundCost(), shape))
        return tree.draft_tokens[0].tolist(), tree.parents[0].tolist()

    def accept(self, plan: RoundPlan, trees: Sequence[Tree]) -> None:
        """A beginning of the first path, and any token."""
        report, more = blank_report(len(trees), plan.num_nodes), []
        for row, (tokens, parents) in enumerate(trees):
            state, is_chain = self.states[row], [p == i - 1 for i, p in enumerate(parents)]
            depth = self.rng.randrange(len(tokens) if all(is_chain) else is_chain.index(False))
            said = [*tokens[1 : depth + 1], self.rng.randrange(3)]
            more.append(said[: 0 if self.ended[row] else state.num_left])
            report.num_nodes[row], report.accept_length[row] = len(tokens), depth
            report.num_taken[row], report.path[row, : depth + 1] = len(more[-1]), range(depth + 1)
        self.drafter.told(self.states, plan, report, StageTimes(0.0, 1.0, 0.0))
        for row, said in enumerate(more):
            self.states[row].token_ids += said
            self.ended[row] = self.states[row].num_left == 0


@pytest.mark.parametrize("batch", [1, 5])
def test_trees_are_the_hosts(gpu: Device, batch: int) -> None:
    """Of every width that is chosen; near the end of an output and behind it too."""
    drafter = DevicePromptLookupDrafter(gpu)
    assert isinstance(drafter, LaunchedDrafter)
    widths = set()
    for seed in range(4):
        rounds = Rounds(gpu, drafter, sequences(batch, seed), Budget(NODES, RoundCost(GPU_SLOPE)))
        for _ in range(8):
            plan, _trees = rounds.one()
            widths.add(plan.num_nodes)
    assert widths <= {*GPU_ENVELOPES, 46} and max(widths) > 1


@pytest.mark.parametrize(
    ("params", "size"),
    [
        (DraftParams(depth=3, top_k=2), 7),
        (DraftParams(depth=20, top_k=1), 21),
        (DraftParams(total_tokens=9), 9),
        (DraftParams(depth=0), 1),
        (DraftParams(total_tokens=1), 1),
        (DraftParams(depth=127, top_k=128, total_tokens=128), 30),  # as many as are verified
    ],
)
def test_shapes_that_were_asked_for(gpu: Device, params: DraftParams, size: int) -> None:
    """They stay, whatever comes of them; and so do their buffers."""
    depth, top_k = 15 if params.depth is None else params.depth, params.top_k or 3
    budget = Budget(30, RoundCost(slope=1.0), params)
    drafter = DevicePromptLookupDrafter(gpu)
    rounds = Rounds(gpu, drafter, sequences(3, seed=2), budget, depth, top_k)
    plans = [rounds.one()[0] for _ in range(4)]
    assert plans[0].num_nodes == size and len(set(plans)) == 1


def test_a_plan_has_buffers_of_its_own(gpu: Device) -> None:
    drafter, cost = DevicePromptLookupDrafter(gpu), RoundCost(GPU_SLOPE)
    asked = [DraftParams(depth=d, top_k=k) for d, k in ((3, 2), (2, 3), (3, 2))]
    one, other, again = (drafter.plan(sequences(2), Budget(16, cost, a)) for a in asked)
    assert one == again and one != other and one.num_nodes == other.num_nodes
    assert drafter.plan(sequences(3), Budget(16, cost, asked[0])) not in (one, other)


# --- which width ----------------------------------------------------------------------------------


@dataclass
class World:
    """Rounds whose drafts are right for so many tokens; what widths are chosen."""

    lengths: Sequence[int]
    slope: float = GPU_SLOPE
    batch: int = 1
    most: int = 46

    def __post_init__(self) -> None:
        self.policy = WidthPolicy()
        self.rng = random.Random(0)

    def run(self, num_rounds: int) -> list[int]:
        """Of the first path, which has all the depth there is."""
        return [self._round() for _ in range(num_rounds)]

    def _round(self) -> int:
        size = self.policy.choose(self.batch, self.most, 15, RoundCost(self.slope))
        accepted = [min(self.rng.choice(self.lengths), size - 1) for _ in range(self.batch)]
        is_accepted = np.arange(1, size) <= np.array(accepted)[:, None]
        self.policy.observe(is_accepted, 15)
        return size


def test_a_text_that_repeats_gets_all_of_a_path() -> None:
    assert set(World([15]).run(100)[20:]) == {16}


def test_short_repetitions_get_small_trees() -> None:
    widths = World([1, 2, 3], slope=0.02).run(200)[50:]
    assert set(widths) == {8}


def test_what_never_pays_is_tried_again_now_and_then() -> None:
    widths = World([0], slope=0.05).run(300)[100:]
    assert 0 < sum(width > 1 for width in widths) < 20


def test_a_text_that_begins_to_repeat_is_noticed() -> None:
    world = World([0], slope=0.02, batch=4)
    world.run(300)
    world.lengths = [10, 15]
    assert set(world.run(200)[100:]) == {16}


def test_sequences_that_have_ended_teach_nothing(gpu: Device) -> None:
    """Nor do those that had no room for a draft, or shapes that were asked for."""

    def width(live: Sequence[int], params: DraftParams | None = None) -> int:
        drafter, states = DevicePromptLookupDrafter(gpu), sequences(2)
        for state in states:
            state.max_len = len(state.token_ids) + 50
        costly = RoundCost(slope=0.3)
        for _ in range(30):
            plan = drafter.plan(states, Budget(16, RoundCost(slope=0.0), params))
            report = blank_report(2, plan.num_nodes)
            report.num_taken[:] = live
            drafter.told(states, plan, report, StageTimes(0.0, 1.0, 0.0))
        return drafter.plan(states, Budget(16, costly)).num_nodes

    assert width([0, 0]) > 1
    assert width([1, 1], DraftParams(depth=3)) > 1
    assert width([1, 1]) == 1
