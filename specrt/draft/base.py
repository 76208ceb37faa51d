"""What a drafter is, and the empty one."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from specrt.tree import chain
from specrt.types import AcceptResult, DraftTree, SequenceState


class RoundCost:
    """What a round of n verified rows costs relative to one row, measured as rounds go by.

    Between measured sizes it interpolates; before there are any it assumes that memory traffic
    dominates, as it does for a model larger than the caches. Measured times move trees, never
    tokens.
    """

    def __init__(self, slope: float = 0.08, decay: float = 0.9) -> None:
        self._slope = slope
        self._decay = decay
        self._ms: dict[int, float] = {}
        self._sizes: list[int] = []  # those of _ms, ascending
        self._seen_once: set[int] = set()

    def observe(self, num_rows: int, ms: float) -> None:
        """Record the verify and accept time of one round."""
        if num_rows not in self._seen_once:
            # The first round of a size also records its graph.
            self._seen_once.add(num_rows)
            return
        if num_rows not in self._ms:
            insort(self._sizes, num_rows)
        known = self._ms.get(num_rows, ms)
        # Outliers (a preempted thread) are capped so that one cannot turn drafting off.
        self._ms[num_rows] = self._decay * known + (1 - self._decay) * min(ms, 2 * known)

    def relative(self, num_rows: int) -> float:
        """Cost of ``num_rows`` rows over that of one row, at least 1."""
        one = self._ms.get(1)
        if one is None or num_rows <= 1:
            return 1.0 + self._slope * max(0, num_rows - 1)
        place = bisect_left(self._sizes, num_rows)
        if place == len(self._sizes):
            below = self._sizes[-1]
            return max(1.0, self._ms[below] / one + self._slope * (num_rows - below))
        above = self._sizes[place]
        if above == num_rows:
            return max(1.0, self._ms[above] / one)
        below = self._sizes[place - 1]
        low = self._ms[below] / one
        high, share = self._ms[above] / one, (num_rows - below) / (above - below)
        return max(1.0, low + share * (high - low))


class Budget:
    """How large a tree may be this round.

    Args:
        max_nodes: nodes a sequence's tree may have, root included.
        cost: measured cost of verifying rows.
    """

    def __init__(self, max_nodes: int, cost: RoundCost) -> None:
        self.max_nodes = max_nodes
        self.cost = cost


class Drafter(Protocol):
    """Proposes trees. It never changes what is said, only how fast."""

    taps: tuple[str, ...]
    """Hidden states it reads from the target (see ``LlamaModel.forward``)."""

    def start(self, state: SequenceState) -> None:
        """A sequence joins; its prompt is in ``state.token_ids``.

        Raises:
            MemoryError: there is no memory for its draft cache.
        """

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """The target has run prompt tokens from position ``start`` on; taps are ``[1, n, H]``."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> DraftTree:
        """A tree for each sequence, rooted at its last token, of at most ``budget.max_nodes``."""

    def observe(
        self,
        states: Sequence[SequenceState],
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """What came of the last proposal; called before the tokens are appended to the states."""

    def finish(self, state: SequenceState) -> None:
        """A sequence leaves, for whatever reason; frees what was held for it."""


class EmptyDrafter:
    """Proposes the root alone: plain decoding as a special case of the same loop."""

    taps: tuple[str, ...] = ()

    def start(self, state: SequenceState) -> None:
        """Nothing is kept."""

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """Nothing is read."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> DraftTree:
        """A tree of one node for each sequence."""
        roots = [[state.token_ids[-1]] for state in states]
        return chain(torch.tensor(roots, dtype=torch.int32))

    def observe(
        self,
        states: Sequence[SequenceState],
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Nothing is learned."""

    def finish(self, state: SequenceState) -> None:
        """Nothing to free."""
