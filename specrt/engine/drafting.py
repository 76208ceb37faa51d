"""A drafter at arm's length: whom it is asked for, and what happens where it fails.

Nothing that a drafter does may change a text or end a request. What it proposes is settled by
:mod:`specrt.tree`; what it raises is caught here: the sequence it was asked for goes on undrafted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from specrt.cache import CacheBatch
from specrt.draft.base import (
    Budget,
    Drafter,
    EmptyDrafter,
    LaunchedDrafter,
    PrefixDrafter,
    RootsAlone,
    RoundPlan,
    StageTimes,
)
from specrt.draft.length.costs import RoundCost
from specrt.engine.merged import Merged
from specrt.engine.request import Request
from specrt.models.layer_run import LowerLayers
from specrt.models.model import LlamaModel
from specrt.models.step import LOGITS_TAP, check_tap
from specrt.tree import check_proposal
from specrt.types import AcceptResult, Proposal, RoundReport, SequenceState

_UNDRAFTED = RootsAlone()
_LAUNCHED = "plan", "launch_propose", "launch_observe", "told"
"""What a :class:`LaunchedDrafter` has."""
_MOST_FAILURES = 3
"""After so many of a sequence's rounds have failed, its neighbours' failures or not, it is done."""


@dataclass(frozen=True)
class Group:
    """Requests that the drafter is asked for in one call, and their rows in the batch."""

    requests: tuple[Request, ...]
    rows: tuple[int, ...]
    is_whole: bool
    """Whether these are all the rows of the batch, in their order."""

    @property
    def states(self) -> list[SequenceState]:
        """As the drafter sees them."""
        return [request.state for request in self.requests]


@dataclass(frozen=True)
class Draft:
    """What was proposed for a batch: for some of its rows the root alone."""

    proposal: Proposal
    """Of the whole batch."""
    parts: tuple[tuple[Group, Proposal], ...]
    """What the drafter gave, to be handed back to it."""
    lower: LowerLayers | None = None
    """What it was lent, if it was asked for the whole batch at once."""


@dataclass(frozen=True)
class Planned:
    """A launched round of a batch, before it is launched."""

    drafter: LaunchedDrafter
    plan: RoundPlan
    taps: tuple[str, ...]

    @property
    def is_drafted(self) -> bool:
        """Whether anybody's drafter has a part in it."""
        return self.drafter is not _UNDRAFTED


class Drafting:
    """Asks a drafter, believes it nothing, and goes on without it.

    Args:
        drafter: proposes.
        target: the model that verifies.
        max_nodes: the largest tree, its root included.

    Raises:
        ValueError: the target has not the hidden states that the drafter reads; names them.
    """

    def __init__(self, drafter: Drafter, target: LlamaModel, max_nodes: int) -> None:
        self._drafter = drafter
        self._taps = tuple(drafter.taps)
        for tap in self._taps:  # a pass that was asked for another would fail for everybody
            check_tap(tap, target.config.num_layers)
        self._target = target
        self.max_nodes = max_nodes
        self._groups: dict[tuple[Request, ...], tuple[Group, ...]] = {}
        self._to_restart: list[Request] = []
        missing = [name for name in _LAUNCHED if not hasattr(drafter, name)]
        if 0 < len(missing) < len(_LAUNCHED):
            logging.getLogger("specrt").warning(
                "%s: its rounds are not launched ahead: it lacks %s",
                type(drafter).__name__,
                ", ".join(missing),
            )

    def regroup(self) -> None:
        """A sequence has joined or left a batch."""
        self._groups.clear()

    def taps(self, requests: Sequence[Request]) -> tuple[str, ...]:
        """Hidden states that are to be read from the target for these."""
        return self._taps if any(r.is_drafted for r in requests) else ()

    # --- a sequence's way ---------------------------------------------------------------------

    def start(self, request: Request) -> None:
        """Its prompt is about to be run."""
        if request.is_drafted:
            request.is_started = True
            self._try([request], lambda: self._drafter.start(request.state))

    def prefill(self, request: Request, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """A piece of its prompt was run."""
        if request.is_drafted:
            self._try([request], lambda: self._drafter.prefill(request.state, start, taps))

    def finish(self, request: Request) -> None:
        """It leaves, or waits again."""
        if not request.is_started:
            return
        try:
            self._drafter.finish(request.state)
        except Exception as error:
            self._warn("finish", error)
        request.is_started = False  # not before: interrupted, it has to be done again

    def num_known(self, request: Request, most: int) -> int:
        """How many of its prompt's first tokens, ``most`` at most, need not be run for the drafter.

        A drafter that is shown hidden states, and does not say, is shown those of every token.
        """
        drafter, counts = self._drafter, list[int]()
        if not request.is_drafted or not isinstance(drafter, PrefixDrafter):
            is_shown = request.is_drafted and any(tap != LOGITS_TAP for tap in self._taps)
            return 0 if is_shown else most

        def ask() -> None:
            count = drafter.num_known(request.state, most)
            if not isinstance(count, int) or not 0 <= count <= most:
                raise ValueError(f"num_known: expected an int in 0..{most}, got {count!r}")
            counts.append(count)

        return counts[0] if self._try([request], ask) else most

    def begin_at(self, request: Request, count: int) -> None:
        """The first so many tokens of its prompt, which :meth:`num_known` gave, are not run."""
        drafter = self._drafter
        if request.is_drafted and isinstance(drafter, PrefixDrafter):
            self._try([request], lambda: drafter.begin_at(request.state, count))

    # --- a round of launches alone ------------------------------------------------------------

    def plan(self, requests: Sequence[Request], cost: RoundCost) -> Planned | None:
        """A round that needs no host, if the drafter and what it is asked for are such.

        Args:
            requests: of a batch.
            cost: what verifying its rows takes.
        """
        groups = self._grouped(requests)
        # What is made of it may well propose.
        if not groups or type(self._drafter) is EmptyDrafter:
            return Planned(_UNDRAFTED, RoundPlan(1), ())
        drafter, group, plans = self._drafter, groups[0], list[RoundPlan | None]()
        if not isinstance(drafter, LaunchedDrafter) or not group.is_whole:
            return None
        if group.requests[0].is_suspect:
            return None
        budget = Budget(self.max_nodes, cost, group.requests[0].draft)
        self._try(requests, lambda: plans.append(_checked(drafter.plan(group.states, budget))))
        plan = plans[0] if plans else None
        if plan is None or not 1 <= plan.num_nodes <= self.max_nodes:
            return None
        return Planned(drafter, plan, self._taps)

    def told(
        self,
        planned: Planned,
        requests: Sequence[Request],
        report: RoundReport,
        times: StageTimes,
    ) -> None:
        """Tell the drafter what came of a planned round."""
        states = [request.state for request in requests]
        running = [request for request in requests if not request.is_over]
        self._try(running, lambda: planned.drafter.told(states, planned.plan, report, times))

    def blame(self, requests: Sequence[Request], error: Exception) -> None:
        """What the drafter launched has failed."""
        self._blame(requests, error)

    # --- a round ------------------------------------------------------------------------------

    def propose(
        self, requests: Sequence[Request], batch: CacheBatch, roots: torch.Tensor, cost: RoundCost
    ) -> Draft:
        """Trees for a batch.

        Args:
            requests: B of them.
            batch: the target's cache of them.
            roots: ``[B]`` int32, their last tokens, where the target is.
            cost: what verifying rows of this batch takes.
        """
        groups = self._grouped(requests)
        is_whole = any(group.is_whole for group in groups)
        merged = None if is_whole else self._merged(len(requests))
        parts = []
        for group in groups:
            lower = self._lower(group, batch, roots)
            proposal = self._ask(group, lower, merged, cost)
            if proposal is None:
                continue
            parts.append((group, proposal))
            if merged is None:
                return Draft(proposal, tuple(parts), lower)
        rows = merged or self._merged(len(requests))
        return Draft(rows.proposal(), tuple(parts))

    def observe(self, draft: Draft, result: AcceptResult, taps: Mapping[str, torch.Tensor]) -> None:
        """Tell the drafter what came of its proposals."""
        for group, proposal in draft.parts:
            outcome, states = (result, taps), group.states
            if not group.is_whole:
                outcome = _rows_of(result, taps, group.rows)
            arguments = (states, proposal, *outcome)
            is_done = self._try(group.requests, lambda: self._drafter.observe(*arguments))  # noqa: B023
            if is_done and group.requests[0].is_suspect:
                group.requests[0].is_suspect = False
                self.regroup()

    def _grouped(self, requests: Sequence[Request]) -> tuple[Group, ...]:
        key = tuple(requests)
        if key not in self._groups:
            self._groups[key] = _groups_of(requests)
        return self._groups[key]

    def _merged(self, batch: int) -> Merged:
        return Merged(batch, self._target.config.vocab_size, self._target.device)

    def _lower(self, group: Group, batch: CacheBatch, roots: torch.Tensor) -> LowerLayers:
        """The target's layers, to be lent for a group."""
        if group.is_whole:
            return LowerLayers(self._target, batch, roots)
        some = CacheBatch(batch.cache, [batch.sequences[row] for row in group.rows])
        return LowerLayers(self._target, some, torch.stack([roots[row] for row in group.rows]))

    def _ask(
        self, group: Group, lower: LowerLayers, merged: Merged | None, cost: RoundCost
    ) -> Proposal | None:
        """What the drafter proposes for a group; None if it fails."""
        given: list[Proposal] = []

        def ask() -> None:
            budget = Budget(self.max_nodes, cost, group.requests[0].draft, lower)
            with closing(lower):
                proposal = self._drafter.propose(group.states, budget)
            check_proposal(proposal, len(group.rows), self._target.device)
            lower.take_proposal(proposal)
            if merged is not None:  # here: the next call may overwrite what this one gave
                merged.take(group.rows, proposal)
            given.append(proposal)

        return given[0] if self._try(group.requests, ask) else None

    # --- what fails ---------------------------------------------------------------------------

    def take_restarts(self) -> list[Request]:
        """Whose draft state is not to be relied on: to be finished and started again."""
        restarts, self._to_restart = self._to_restart, []
        return restarts

    def _try(self, requests: Sequence[Request], call: Callable[[], None]) -> bool:
        """Whether the drafter did what it was called for; if not, who is to go on without it."""
        try:
            call()
        except Exception as error:
            self._blame(requests, error)
            return False
        return True

    def _blame(self, requests: Sequence[Request], error: Exception) -> None:
        """One sequence alone is to blame; of several each starts again and is asked for alone."""
        self.regroup()
        for request in requests:
            request.num_failures += 1
            if len(requests) == 1 or request.num_failures >= _MOST_FAILURES:
                self._give_up(request, error)
            else:
                request.is_suspect = True
                self._to_restart.append(request)

    def _give_up(self, request: Request, error: Exception) -> None:
        request.is_drafted = False
        self._warn(f"request {request.handle.id} goes on undrafted", error)
        self.finish(request)

    def _warn(self, what: str, error: Exception) -> None:
        name = type(self._drafter).__name__
        logging.getLogger("specrt").warning(
            "%s: %s: %s: %s", name, what, type(error).__name__, error
        )


def _checked(plan: RoundPlan | None) -> RoundPlan | None:
    """What a drafter planned, if it is a plan: its shape can name a round, its size be one."""
    if plan is None:
        return None
    if not isinstance(plan, RoundPlan) or not all(
        isinstance(size, int) for size in (plan.num_nodes, plan.num_layers)
    ):
        raise TypeError(f"plan: expected None or a RoundPlan of int sizes, got {plan!r}")
    hash(plan)
    return plan


def _groups_of(requests: Sequence[Request]) -> tuple[Group, ...]:
    """The drafted requests by the shape that was asked for; suspects each by itself."""
    rows: dict[object, list[int]] = {}
    for row, request in enumerate(requests):
        if request.is_drafted:
            key = request.handle if request.is_suspect else request.draft
            rows.setdefault(key, []).append(row)
    return tuple(
        Group(tuple(requests[row] for row in some), tuple(some), len(some) == len(requests))
        for some in rows.values()
    )


def _rows_of(
    result: AcceptResult, taps: Mapping[str, torch.Tensor], rows: Sequence[int]
) -> tuple[AcceptResult, Mapping[str, torch.Tensor]]:
    """A group's rows of what came of a round."""

    def some(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor[row] for row in rows])

    part = AcceptResult(
        some(result.path),
        some(result.accept_length),
        some(result.tokens),
        report=None if result.report is None else result.report.of(rows),
    )
    return part, {name: some(tap) for name, tap in taps.items()}
