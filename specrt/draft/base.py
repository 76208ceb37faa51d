"""What a drafter is, and the empty one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from specrt.models.layer_run import LowerLayers
from specrt.tree import MAX_NODES, chain
from specrt.types import AcceptResult, Proposal, SequenceState

_RANGES = {"depth": (0, MAX_NODES - 1), "top_k": (1, MAX_NODES), "total_tokens": (1, MAX_NODES)}
_LEAST_MS = 1e-6  # a coarse clock may say that nothing took any time


@dataclass(frozen=True)
class DraftParams:
    """The shape of the trees of one call; None leaves a choice to the drafter.

    With any field given sizes are fixed, and nothing that was measured is used. A tree may still be
    smaller: near the end of an output, or where a drafter has no more to say.

    Raises:
        ValueError: a field is out of range.
    """

    depth: int | None = None
    """Distance from the root of the deepest drafted node, one more than EAGLE-2's ``depth``; 0 is
    the root alone, plain decoding."""
    top_k: int | None = None
    """Children of a node at most, and nodes expanded at each depth."""
    total_tokens: int | None = None
    """Nodes of the tree at most, its root included."""

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_int and least <= value <= most):
                raise ValueError(
                    f"{name}: expected None or an int in {least}..{most}, got {value!r}"
                )


class RoundCost:
    """What verifying n rows costs relative to one row, measured as rounds go by.

    A line through the last few dozen rounds: one row's time, and the time of each further row.
    Where all rounds were of one size, the line's slope is what it has been in the long run. (A
    table by size was tried: on a noisy machine its entries contradict each other for hundreds of
    rounds. So was one row's time from plain rounds alone: it is stale when the machine's speed has
    changed.) Before there are measurements memory traffic is taken to dominate, as it does for a
    model larger than the caches. Measured times move trees, never tokens.

    Args:
        slope: cost of a further row, in rows, before anything is measured.
        memory: weight of the past, a round.
    """

    _STIFFNESS = 30.0  # of the slope, in the units of x²: less than one round of eight rows
    _SLOW = 0.02

    def __init__(self, slope: float = 0.08, memory: float = 0.97) -> None:
        self._slope = slope
        self._memory = memory
        self._one_ms: float | None = None
        self._row_ms = 0.0
        self._sums = [0.0] * 5  # of 1, x, x², y, xy, where x = further rows and y = ms
        self._seen_once: set[int] = set()

    @property
    def one_ms(self) -> float | None:
        """Time of a round that verifies one row; None before any was measured."""
        return self._one_ms

    def observe(self, num_rows: int, ms: float) -> None:
        """Record the time of one round, drafting excluded."""
        if num_rows not in self._seen_once:
            # The first round of a size also records its graph.
            self._seen_once.add(num_rows)
            return
        ms, x = max(ms, _LEAST_MS), num_rows - 1
        if self._one_ms is not None:
            # Outliers (a preempted thread) are capped so that one cannot turn drafting on or off.
            ms = min(ms, 2.0 * (self._one_ms + x * self._row_ms))
        seen = (1.0, x, x * x, ms, x * ms)
        self._sums = [self._memory * old + new for old, new in zip(self._sums, seen, strict=True)]
        self._fit()

    def relative(self, num_rows: int) -> float:
        """Cost of ``num_rows`` rows over that of one row, at least 1."""
        slope = self._slope if self._one_ms is None else self._row_ms / self._one_ms
        return 1.0 + slope * max(0, num_rows - 1)

    def _fit(self) -> None:
        """Least squares of y = one + row * x, with row held near slope * one."""
        count, x, xx, y, xy = self._sums
        slope, stiff = self._slope, self._STIFFNESS
        a, b, c = count + stiff * slope * slope, x - stiff * slope, xx + stiff
        determinant = a * c - b * b
        one, row = (c * y - b * xy) / determinant, (a * xy - b * y) / determinant
        # Noise may tilt the line past what can be; then it goes through the mean at that tilt.
        tilt = min(1.0, max(0.0, row / one if one > 0 else 1.0))
        if one <= 0 or not 0.0 <= row <= one:
            one = y / (count + tilt * x)
            row = tilt * one
        self._one_ms, self._row_ms = one, row
        self._slope += self._SLOW * (tilt - self._slope)


class Budget:
    """How large a tree may be this round, and what a drafter is lent to make it.

    Args:
        max_nodes: nodes a sequence's tree may have, root included.
        cost: measured cost of verifying rows.
        params: what the caller asked for.
        lower: the target's first layers, for drafters that run them over the round's sequences.
    """

    def __init__(
        self,
        max_nodes: int,
        cost: RoundCost,
        params: DraftParams | None = None,
        lower: LowerLayers | None = None,
    ) -> None:
        self.max_nodes = max_nodes
        self.cost = cost
        self.params = params or DraftParams()
        self.lower = lower


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

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """A tree for each sequence, rooted at its last token, of at most ``budget.max_nodes``.

        Of a larger one the first so many nodes are verified.
        """

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """What came of the last proposal; called before the tokens are appended to the states."""

    def finish(self, state: SequenceState) -> None:
        """A sequence leaves, for whatever reason (``start`` that raised is one); frees what was
        held for it."""


@runtime_checkable
class ShapedDrafter(Protocol):
    """What a drafter has besides if not every :class:`DraftParams` goes with it."""

    def check(self, params: DraftParams) -> None:
        """Called before anything runs.

        Raises:
            ValueError: ``params`` is out of this drafter's range; names the field.
        """


class EmptyDrafter:
    """Proposes the root alone: plain decoding as a special case of the same loop."""

    taps: tuple[str, ...] = ()

    def start(self, state: SequenceState) -> None:
        """Nothing is kept."""

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """Nothing is read."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """A tree of one node for each sequence."""
        roots = [[state.token_ids[-1]] for state in states]
        return chain(torch.tensor(roots, dtype=torch.int32))

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Nothing is learned."""

    def finish(self, state: SequenceState) -> None:
        """Nothing to free."""
