"""What a drafter is, and the empty one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from specrt.tree import MAX_NODES, chain
from specrt.types import AcceptResult, DraftTree, SequenceState


@dataclass(frozen=True)
class DraftParams:
    """The shape of the trees of one call; None leaves a choice to the drafter.

    Raises:
        ValueError: a field is out of range.
    """

    depth: int | None = None
    """Expansions below the root's children (EAGLE-2's ``depth``); 0 leaves those alone."""
    top_k: int | None = None
    """Children of a node, and nodes expanded at each depth."""
    total_tokens: int | None = None
    """Nodes of the tree, its root included."""

    def __post_init__(self) -> None:
        for name, least in (("depth", 0), ("top_k", 1), ("total_tokens", 1)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and least <= value <= MAX_NODES):
                raise ValueError(
                    f"{name}: expected None or an int in {least}..{MAX_NODES}, got {value!r}"
                )


class RoundCost:
    """What verifying n rows costs relative to one row, measured as rounds go by.

    A line: one row's time and the time each further row adds, both running averages. (A table by
    size was tried: on a noisy machine its entries contradict each other for hundreds of rounds.)
    Before there are measurements it assumes that memory traffic dominates, as it does for a model
    larger than the caches. Measured times move trees, never tokens.

    Args:
        slope: cost of a further row, in rows, before anything is measured.
        decay: weight of the past in the running averages.
    """

    def __init__(self, slope: float = 0.08, decay: float = 0.95) -> None:
        self._slope = slope
        self._decay = decay
        self._one_ms: float | None = None
        self._least_rows = 0
        self._seen_once: set[int] = set()

    @property
    def one_ms(self) -> float | None:
        """Time of a round that verifies one row, judged by the smallest seen; None before any."""
        return self._one_ms

    def observe(self, num_rows: int, ms: float) -> None:
        """Record the time of one round, drafting excluded."""
        if num_rows not in self._seen_once:
            # The first round of a size also records its graph.
            self._seen_once.add(num_rows)
            return
        one = self._one_ms
        if one is None or num_rows < self._least_rows:
            self._one_ms, self._least_rows = ms / self.relative(num_rows), num_rows
        elif num_rows == self._least_rows:  # one; in a batch, which never verifies one, its size
            # Outliers (a preempted thread) are capped so that one cannot turn drafting on or off.
            self._one_ms = self._mix(one, min(ms / self.relative(num_rows), 1.5 * one))
        else:
            seen = max(0.0, ms / one - 1.0) / (num_rows - 1)
            self._slope = self._mix(self._slope, min(seen, 2.0 * self._slope + 0.05))

    def relative(self, num_rows: int) -> float:
        """Cost of ``num_rows`` rows over that of one row, at least 1."""
        return 1.0 + self._slope * max(0, num_rows - 1)

    def _mix(self, known: float, seen: float) -> float:
        return self._decay * known + (1.0 - self._decay) * seen


class Budget:
    """How large a tree may be this round.

    Args:
        max_nodes: nodes a sequence's tree may have, root included.
        cost: measured cost of verifying rows.
        params: what the caller asked for.
    """

    def __init__(self, max_nodes: int, cost: RoundCost, params: DraftParams | None = None) -> None:
        self.max_nodes = max_nodes
        self.cost = cost
        self.params = params or DraftParams()


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
