"""A drafter that is as right as another one was: for the time of rounds, not for what drafts win.

It knows what the target is going to say, from a run before, and is told round by round how many
tokens to get right. So the acceptance is planted, and drafting takes no time; what is real is the
time that the target takes to verify such trees.

Run by itself (``python -m bench.planted --save``) it writes down how much of the bundled FSPAD
drafter's trees the bundled target accepts on held-out problems, greedily.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from bench.draft_contenders import Tree
from bench.harness import RESULTS, environment, parser, report, result_of, save_result, start
from bench.prompts import HELDOUT, load_prompts
from specrt.device import Device
from specrt.draft.base import BatchTables, Budget, EmptyDrafter, RootsAlone, RoundPlan
from specrt.tree import TreeBuilder, stack
from specrt.types import Proposal, SequenceState

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
        return stack([self._tree(_num_said(state), self._num_right()) for state in states])

    # --- rounds of launches alone ---------------------------------------------------------------

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan:
        """Upload the next round's tree; all plans are equal."""
        (state,) = states
        if self._num_said is None:
            self._num_said = _num_said(state)
        num_right = self._num_right()
        tree = self._tree(self._num_said, num_right)
        self._num_said += num_right + 1
        ints = torch.tensor([*tree.tokens, *tree.parents, len(tree)], dtype=torch.int32)
        self._device.upload(ints, self._ints)
        return RoundPlan(self._trace.num_nodes)

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
