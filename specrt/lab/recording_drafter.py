"""A drafter that writes down the chain drafted at every token and lets the target speak alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from specrt.draft.base import Budget, Drafter, DraftParams, ShapedDrafter
from specrt.draft.length.costs import DraftCosts
from specrt.lab.trace import TraceSequence
from specrt.tree import chain
from specrt.types import AcceptResult, Proposal, SequenceState


class Chains(Protocol):
    """What a chain drafter thought of a proposal."""

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """``[B, K]`` ints."""

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """``[B, K]``: logarithms of probabilities."""

    @property
    def evidence(self) -> npt.NDArray[np.float32]:
        """``[B, K, 2]``: of the calibration head, greedy and above temperature 0."""


@runtime_checkable
class ChainProposal(Protocol):
    """What a proposal of a :class:`ChainDrafter` has besides."""

    @property
    def chain(self) -> Chains | None:
        """None where nothing was drafted. Read before the next proposal is made."""


class ChainDrafter(Drafter, Protocol):
    """A drafter of chains, of ``DraftParams.depth`` tokens, that says what it thinks of them.

    Its proposals are :class:`ChainProposal`. Near its end a sequence's chain may reach further than
    the output can.
    """

    def costs(self, batch: int = 1) -> DraftCosts:
        """Milliseconds of a round's parts, as measured so far."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Recorded(Proposal):
    """The roots of what was drafted, and the whole."""

    inner: Proposal


@dataclass(eq=False)
class Recording:
    """The chains of one sequence, one for each output token so far."""

    state: SequenceState
    tokens: list[npt.NDArray[Any]] = field(default_factory=list)
    scores: list[npt.NDArray[np.float32]] = field(default_factory=list)
    evidence: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def add(self, chains: Chains | None, row: int) -> None:
        """Copy row ``row`` of ``chains``, or an empty chain, for the token that comes next."""
        if chains is None:
            nothing = np.empty(0, dtype=np.float32)
            tokens, scores, evidence = nothing.astype(np.int32), nothing, nothing
        else:
            # The bonus token takes the last place.
            length = min(chains.tokens.shape[1], max(0, self.state.num_left - 1))
            mode = int(self.state.temperature > 0)
            tokens = chains.tokens[row, :length].copy()
            scores = chains.scores[row, :length].copy()
            evidence = chains.evidence[row, :length, mode].copy()
        self.tokens.append(tokens)
        self.scores.append(scores)
        self.evidence.append(evidence)

    def sequence(
        self, task: str, index: int, max_draft: int, overrun_ids: Sequence[int]
    ) -> TraceSequence:
        """The whole, once the sequence has ended without an error.

        Args:
            task, index, overrun_ids: as in :class:`TraceSequence`.
            max_draft: K.

        Raises:
            ValueError: as :class:`TraceSequence`, or a chain was longer than K.
        """
        state = self.state
        return TraceSequence(
            task=task,
            index=index,
            seed=state.seed,
            prompt_len=state.prompt_len,
            max_len=state.max_len,
            token_ids=tuple(state.token_ids[state.prompt_len :]),
            overrun_ids=tuple(overrun_ids),
            draft_tokens=_padded(self.tokens, max_draft, -1, np.int32),
            scores=_padded(self.scores, max_draft, np.nan, np.float32),
            evidence=_padded(self.evidence, max_draft, np.nan, np.float32),
        )


class RecordingDrafter:
    """Keeps what another drafter proposes, and proposes the root alone.

    So the target emits one token a round, and every output position becomes a root. A call with
    ``DraftParams(depth=K)`` makes every chain K tokens long. One stream may run at a time.

    Args:
        inner: drafts the chains.
    """

    def __init__(self, inner: ChainDrafter) -> None:
        self.taps = inner.taps
        self.recordings: list[Recording] = []
        """Of every sequence, in the order in which they started."""
        self._inner = inner
        self._running: dict[SequenceState, Recording] = {}

    def check(self, params: DraftParams) -> None:
        """Passed on."""
        if isinstance(self._inner, ShapedDrafter):
            self._inner.check(params)

    def start(self, state: SequenceState) -> None:
        """Begin a recording."""
        self._inner.start(state)
        self._running[state] = Recording(state)
        self.recordings.append(self._running[state])

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """Passed on."""
        self._inner.prefill(state, start, taps)

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """Draft the chains, keep them, and hand over their roots."""
        inner = self._inner.propose(states, budget)
        assert isinstance(inner, ChainProposal), "a drafter of chains says what it thinks of them"
        chains = inner.chain
        for row, state in enumerate(states):
            self._running[state].add(chains, row)
        roots = chain(inner.draft_tokens[:, :1])
        return _Recorded(roots.draft_tokens, roots.parents, roots.num_nodes, inner=inner)

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Passed on: of every chain nothing was accepted."""
        assert isinstance(proposal, _Recorded), "the engine gives back what it was given"
        self._inner.observe(states, proposal.inner, result, taps)

    def finish(self, state: SequenceState) -> None:
        """End the recording, which stays in :attr:`recordings`."""
        self._running.pop(state, None)
        self._inner.finish(state)


def _padded(
    rows: Sequence[npt.NDArray[Any]], width: int, padding: float, dtype: type
) -> npt.NDArray[Any]:
    longest = max((len(row) for row in rows), default=0)
    if longest > width:
        raise ValueError(f"max_draft: expected at least {longest}, the longest chain, got {width}")
    padded: npt.NDArray[Any] = np.full((len(rows), width), padding, dtype=dtype)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded
