"""Prompt lookup by a search of the history against the host's index of n-grams, and numpy.

Columns: B histories of so many tokens; the call through Python, and the kernel alone, launched as a
graph; one more token into the host drafter's index and a tree out of it; numpy, which compares all
places at once; how much the better of these takes for one call of ours. The index has seen the rest
of the text before, which takes some microseconds a token, once, and some hundred bytes.
"""

from __future__ import annotations

import numpy as np
import torch

from bench.harness import Row, measure_interleaved, parser, ratio_to, report, start
from specrt.draft.base import Budget, DraftParams
from specrt.draft.length.costs import RoundCost
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.ops import prompt_lookup
from specrt.ops.graph import CpuGraph
from specrt.tree import TreeBuilder
from specrt.types import Proposal, SequenceState

NODES, DEPTH, MAX_NGRAM, CONTINUATIONS = 64, 15, 4, 3


class Histories:
    """``batch`` texts of ``length`` tokens, whose last three come again once in some thousand."""

    def __init__(self, batch: int, length: int) -> None:
        rng = np.random.default_rng(length)
        self.texts = rng.zipf(1.3, (batch, length)).clip(max=30_000).astype(np.int32)
        history = torch.from_numpy(self.texts)
        lengths = torch.full((batch,), length, dtype=torch.int32)
        self.given = history, lengths, lengths + 1000
        self.tokens, parents = torch.zeros(2, batch, NODES, dtype=torch.int32)
        self._out = self.tokens, parents, *torch.zeros(3, batch, dtype=torch.int32)
        self._drafter = PromptLookupDrafter()
        self._states = [
            SequenceState(text.tolist(), length, length + 1000, 0, 0.0) for text in self.texts
        ]
        for state in self._states:
            self._drafter.start(state)
        shape = DraftParams(depth=DEPTH, top_k=CONTINUATIONS, total_tokens=NODES)
        self._budget = Budget(NODES, RoundCost(), shape)

    def ours(self) -> None:
        prompt_lookup(*self.given, MAX_NGRAM, 1, CONTINUATIONS, DEPTH, *self._out)

    def by_index(self) -> Proposal:
        return self._drafter.propose(self._states, self._budget)

    def in_numpy(self) -> list[TreeBuilder]:
        return [self._tree(text) for text in self.texts]

    def _tree(self, text: np.ndarray) -> TreeBuilder:
        count = len(text) - 1  # places
        match, is_same = np.zeros(count, dtype=np.int64), np.ones(count, dtype=bool)
        for back in range(MAX_NGRAM):
            is_same[:back] = False
            is_same[back:] &= text[: count - back] == text[-1 - back]
            match += is_same
        tree, best = TreeBuilder(int(text[-1])), match.max()
        for end in np.flatnonzero(match == best)[: -CONTINUATIONS - 1 : -1] + 1 if best else ():
            tree.add_path(np.resize(text[end:], DEPTH).tolist(), NODES)
        return tree


def one_row(batch: int, length: int) -> Row:
    histories = Histories(batch, length)
    graph = CpuGraph.capture(histories.ours)
    histories.ours()
    for row, (tree, host) in enumerate(
        zip(histories.in_numpy(), histories.by_index().draft_tokens.tolist(), strict=True)
    ):
        ours = histories.tokens[row].tolist()
        assert ours[: len(tree)] == tree.tokens == host[: len(tree)]
    times = measure_interleaved(
        {
            "specrt": histories.ours,
            "kernel": graph.launch,
            "index": histories.by_index,
            "numpy": histories.in_numpy,
        },
        warmup=2,
        min_time=0.03,
        rounds=5,
    )
    return {
        "batch": batch,
        "tokens": length,
        **{f"{name}_us": 1e6 * seconds for name, seconds in times.items()},
        "ratio": ratio_to(min(times["index"], times["numpy"]), times["specrt"]),
    }


def main() -> None:
    """Measure and report."""
    args = start(parser(__doc__))
    lengths = (512, 8192) if args.quick else (128, 512, 2048, 8192, 32768)
    batches = (1,) if args.quick else (1, 8)
    report("prompt_lookup", [one_row(b, n) for b in batches for n in lengths], save=args.save)


if __name__ == "__main__":
    main()
