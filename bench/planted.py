"""A drafter that is as right as another one was: for the time of rounds, not for what drafts win.

It knows what the target is going to say, from a run before, and is told round by round how many
tokens to get right. So the acceptance is planted, and drafting takes no time; what is real is the
time that the target takes to verify such trees.

Run by itself (``python -m bench.planted --save``) it writes down how much of the bundled FSPAD
drafter's trees the bundled target accepts on held-out problems, greedily.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from bench.draft_contenders import Tree
from bench.harness import RESULTS, environment, parser, report, result_of, save_result, start
from bench.prompts import HELDOUT, load_prompts
from specrt.cache import KVCache
from specrt.device import Device
from specrt.draft.base import (
    BatchTables,
    Budget,
    EmptyDrafter,
    RootsAlone,
    RoundPlan,
    StageTimes,
)
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.fspad.on_device import DeviceFspadDrafter
from specrt.tree import TreeBuilder, stack
from specrt.types import AcceptResult, DraftTree, Proposal, RoundReport, SequenceState

NODES = (60, 8, 16, 32)
TRACE = "accept_lengths"
_PROMPTS, _TOKENS = 16, 96


@dataclass(frozen=True)
class Trace:
    """What was accepted of a drafter's trees of one size, and emitted."""

    num_nodes: int
    depth: int
    """Levels below the root."""
    accept_lengths: Sequence[int]


def recorded_trace(num_nodes: int) -> Trace:
    """The bundled drafter's, for trees of one of the sizes in ``NODES``."""
    result = json.loads((RESULTS / f"{TRACE}.json").read_text())
    row = next(row for row in result["rows"] if row["nodes"] == num_nodes)
    return Trace(num_nodes, row["depth"], [int(digit) for digit in row["accept_lengths"]])


class PlantedDrafter(EmptyDrafter, RootsAlone):
    """Proposes the first so many tokens of what comes, and wrong ones behind and beside them.

    One sequence at a time. Its rounds may be launches alone: trees are uploaded as they are
    planned, by what it knows of the rounds under way, for as much is accepted as was planted.

    Args:
        answer: what the target will say after the prompt.
        trace: how many to get right, round by round, over and over.
        vocab_size: more than a tree's nodes.
        device: the target's.
    """

    def __init__(
        self, answer: Sequence[int], trace: Trace, vocab_size: int, device: Device
    ) -> None:
        if not trace.depth < trace.num_nodes < vocab_size:
            raise ValueError(
                f"trace: expected depth < num_nodes < {vocab_size}, got {trace.depth} and "
                f"{trace.num_nodes}"
            )
        self._answer = answer
        self._trace = trace
        self._vocab_size = vocab_size
        self._device = device
        self._lengths = iter(())
        self._num_said: int | None = None
        self._ints = self._device.zeros(2 * trace.num_nodes + 1, dtype=torch.int32)

    def start(self, state: SequenceState) -> None:
        """Begin the trace."""
        self._lengths = cycle(self._trace.accept_lengths)
        self._num_said = None

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """Trees of one size, whatever there is still to say: the last ones reach past the end."""
        self._num_said = None  # no round is under way
        return stack([self._tree(_num_said(state), self._num_right()) for state in states])

    # --- rounds of launches alone ---------------------------------------------------------------

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan | None:
        """Upload the next round's tree; all plans are equal."""
        self._upload_tree(*states)
        return RoundPlan(self._trace.num_nodes)

    def _upload_tree(self, state: SequenceState) -> None:
        if self._num_said is None:
            self._num_said = _num_said(state)
        num_right = self._num_right()
        tree = self._tree(self._num_said, num_right)
        self._num_said += num_right + 1
        ints = torch.tensor([*tree.tokens, *tree.parents, len(tree)], dtype=torch.int32)
        self._device.upload(ints, self._ints)

    def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
        """The tree where it was uploaded to."""
        size = self._trace.num_nodes
        tokens, parents = self._ints[: 2 * size].view(2, 1, size)
        return Proposal(tokens, parents, self._ints[2 * size :])

    # --- trees ----------------------------------------------------------------------------------

    def _num_right(self) -> int:
        return min(next(self._lengths), self._trace.depth)

    def _tree(self, said: int, num_right: int) -> TreeBuilder:
        """For what comes after ``said`` tokens of the answer; the root's token is the engine's."""
        trace = self._trace
        coming = [*self._answer[said:], *[0] * trace.depth][: trace.depth]
        tree, path = TreeBuilder(0), [0]
        for level, token in enumerate(coming):
            path.append(tree.add(path[-1], token if level < num_right else self._wrong(token, 0)))
        # Siblings of the path, level by level.
        for extra in range(trace.num_nodes - len(tree)):
            level = extra % trace.depth
            tree.add(path[level], self._wrong(coming[level], 1 + extra // trace.depth))
        return tree

    def _wrong(self, token: int, index: int) -> int:
        """The ``index``-th token that is not ``token``."""
        return (token + 1 + index) % self._vocab_size


class PlantedRounds(PlantedDrafter):
    """Does all that another drafter does in a round, and then proposes the planted tree: drafting
    takes its time, and acceptance is a given.

    Args:
        drafter: whose rounds; it neither chooses its trees' size nor learns from them.
        answer: as of :class:`PlantedDrafter`, as the next three.
        trace: of trees of its size.
        vocab_size: as there.
        device: as there.
    """

    def __init__(
        self,
        drafter: FspadDrafter,
        answer: Sequence[int],
        trace: Trace,
        vocab_size: int,
        device: Device,
    ) -> None:
        super().__init__(answer, trace, vocab_size, device)
        self._drafter, self.taps = drafter, drafter.taps

    def start(self, state: SequenceState) -> None:
        """Begin the trace."""
        super().start(state)
        self._drafter.start(state)

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """As it does."""
        self._drafter.prefill(state, start, taps)

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """Draft, and propose the planted tree."""
        self._drafter.propose(states, budget)
        return super().propose(states, budget)

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """As it does."""
        self._drafter.observe(states, proposal, result, taps)

    def finish(self, state: SequenceState) -> None:
        """As it does."""
        self._drafter.finish(state)

    @property
    def cache(self) -> KVCache:
        """Its."""
        return self._drafter.cache

    # --- rounds of launches alone ---------------------------------------------------------------

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan | None:
        """Its plan, if it has one, for as many nodes."""
        if not isinstance(self._drafter, DeviceFspadDrafter):
            return None
        plan = self._drafter.plan(states, budget)
        if plan is not None:
            assert plan.num_nodes == self._trace.num_nodes, "trees of the trace's size"
            self._upload_tree(*states)
        return plan

    def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
        """Draft, and propose the planted tree."""
        assert isinstance(self._drafter, DeviceFspadDrafter)
        self._drafter.launch_propose(plan, tables)
        return super().launch_propose(plan, tables)

    def launch_observe(
        self,
        plan: RoundPlan,
        tables: BatchTables,
        tree: DraftTree,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """As it does."""
        assert isinstance(self._drafter, DeviceFspadDrafter)
        self._drafter.launch_observe(plan, tables, tree, result, taps)

    def told(
        self,
        states: Sequence[SequenceState],
        plan: RoundPlan,
        report: RoundReport,
        times: StageTimes,
    ) -> None:
        """As it is."""
        assert isinstance(self._drafter, DeviceFspadDrafter)
        self._drafter.told(states, plan, report, times)


def _num_said(state: SequenceState) -> int:
    return len(state.token_ids) - state.prompt_len


# --- the recording ----------------------------------------------------------------------------


def record(num_prompts: int, num_tokens: int) -> list[dict[str, Any]]:
    """A row for each size: what the bundled drafter's trees were worth, over all prompts."""
    from specrt import SamplingParams, load

    engine = load(drafter="fspad", dtype="float32", progress=False)
    texts = load_prompts("heldout", HELDOUT, num_prompts).texts
    rows = []
    for num_nodes in sorted(NODES):
        tree = Tree.of_size(num_nodes)
        lengths: list[int] = []
        for text in texts:
            params = SamplingParams(max_new_tokens=num_tokens)
            lengths += engine.generate(text, params, tree.params).stats.accept_lengths
        rows.append(
            {
                "nodes": num_nodes,
                "tree": str(tree),
                "depth": tree.depth,
                "rounds": len(lengths),
                "tau": 1 + sum(lengths) / len(lengths),
                "accept_lengths": "".join(map(str, lengths)),  # below ten, round by round
            }
        )
    return rows


def main() -> None:
    """Record, print and save."""
    args = start(parser(__doc__))
    rows = record(2, 16) if args.quick else record(_PROMPTS, _TOKENS)
    shown = [{name: row[name] for name in row if name != "accept_lengths"} for row in rows]
    where = environment()
    report(TRACE, shown, where=where)
    if args.save:
        save_result(result_of(TRACE, rows, {}, where), args.save)


if __name__ == "__main__":
    main()
