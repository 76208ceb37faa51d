"""EESD in rounds that are launches alone: as :mod:`specrt.draft.eesd.on_device`, a round late.

A round's plan is its number of levels, of a few sizes: by what late rounds wanted to verify, and 0
where drafting rests or a plain round is due. A level that nobody wants is left out by its launches
themselves, so a size too large costs little. Hosted rounds (trees, several shapes in one batch, no
pages for two rounds) and these go on where the others ended: both leave the exit's cache even.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from specrt.cache import CacheBatch
from specrt.draft.base import BatchTables, Budget, RoundPlan, StageTimes
from specrt.draft.eesd.chain_round import ChainKey, ChainRound
from specrt.draft.eesd.model import ExitModel
from specrt.draft.eesd.on_device import DeviceEesdDrafter
from specrt.draft.eesd.round import MAX_DRAFT_NODES
from specrt.draft.eesd.sequences import REST, REST_FORGOTTEN
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.costs import DraftCosts
from specrt.reuse import Recent, power_of_two
from specrt.tree import MAX_NODES
from specrt.types import AcceptResult, DraftTree, Proposal, RoundReport, SequenceState

_MAX_ROUNDS = 32  # kinds of round whose buffers are kept


class LaunchedEesdDrafter(DeviceEesdDrafter):
    """Drafts with an exit of the target, on a GPU; arguments and chains as of ``EesdDrafter``."""

    def __init__(
        self,
        exit_model: ExitModel,
        control: ControlOptions | None = None,
        *,
        is_coupled: bool = True,
        costs: DraftCosts | None = None,
    ) -> None:
        super().__init__(exit_model, control, is_coupled=is_coupled, costs=costs)
        self._pages = CacheBatch(self._cache)
        self._rounds: Recent[ChainKey, ChainRound] = Recent(_MAX_ROUNDS)
        self._was_idle = False

    # --- the protocol -------------------------------------------------------------------------

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan | None:
        """Pages in the exit's cache for this round and the one under way, and a round's buffers."""
        params = budget.params
        self.check(params)
        if (params.top_k or 1) > 1:
            return None
        num_levels = self._levels_of(budget)
        drafts = [self._drafts[state] for state in states]
        ahead = max(draft.num_ahead for draft in drafts) + 1 + num_levels
        for draft in drafts:
            draft.num_ahead = 1 + num_levels
        longest = max(len(state.token_ids) for state in states)
        if longest - 1 + ahead > self.exit_model.target.config.max_positions:
            return None
        try:
            self._catch_up(states)  # with plain rounds of the host's: none is under way then
            for state, draft in zip(states, drafts, strict=True):
                self._cache.reserve(draft.cached, len(state.token_ids) - 1 + ahead)
        except MemoryError:  # a round at a time needs less
            return None
        is_controlled = num_levels > 0 and params.depth is None
        made = self._round_of(states, num_levels, is_controlled)
        if made.control is not None:
            made.control.stage(
                self.control, states, self.costs(len(states)), caps=[num_levels] * len(states)
            )
            made.control.expect(REST_FORGOTTEN if self._was_idle else 1)
        return RoundPlan(made.key.num_nodes, made, self.exit_model.num_layers)

    def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
        """Run and draft level after level."""
        assert isinstance(plan.shape, ChainRound)
        return plan.shape.launch(tables)

    def launch_observe(
        self,
        plan: RoundPlan,
        tables: BatchTables,
        tree: DraftTree,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """The controller learns; the exit's rows lie where they belong."""
        assert isinstance(plan.shape, ChainRound)
        plan.shape.learn(result.accept_length)

    def told(
        self,
        states: Sequence[SequenceState],
        plan: RoundPlan,
        report: RoundReport,
        times: StageTimes,
    ) -> None:
        """The exit's cache holds what the target's does; what was wanted, and what it took."""
        assert isinstance(plan.shape, ChainRound)
        key = plan.shape.key
        for state, length in zip(states, report.accept_length.tolist(), strict=True):
            draft = self._drafts.get(state)
            if draft is not None:
                draft.cached.length += 1 + length
        longest = int(report.num_nodes.max()) - 1
        if key.is_controlled:
            self._learn_levels(key.num_levels, longest)
            self._was_idle = longest == 0 and self._weighs_time
            self._rest_left = REST - 1 if self._was_idle else 0
        if plan.shape.is_warm and self._given_costs is None:
            self._meter.observe_launched(key.batch, key.num_levels, longest, times)
        plan.shape.is_warm = True

    # --- a round ------------------------------------------------------------------------------

    def _levels_of(self, budget: Budget) -> int:
        """How many to launch."""
        params = budget.params
        room = min(params.total_tokens or MAX_NODES, budget.max_nodes, 1 + MAX_DRAFT_NODES) - 1
        if params.depth is not None:
            return min(params.depth, room)
        if self._is_resting(budget) or (self._weighs_time and self._meter.is_plain_due()):
            return 0
        wanted = self._num_levels()
        if not self._is_known:  # of few sizes, each of which is a graph
            wanted = min(power_of_two(wanted), self._options.max_draft)
        return min(wanted, room)

    def _round_of(
        self, states: Sequence[SequenceState], num_levels: int, is_controlled: bool
    ) -> ChainRound:
        device, batch = self._device, len(states)
        # (Nobody reads its lengths.)
        drafts = [self._drafts[state].cached for state in states]
        pages = self._pages.update(drafts, is_ahead=True)
        self.exit_model.reserve(batch, 1, pages.num_positions)
        is_coupled = self.is_coupled and any(state.temperature > 0 for state in states)
        table = pages.block_table
        key = ChainKey(
            batch,
            num_levels,
            is_coupled,
            is_controlled,
            device.version,
            table.data_ptr(),
            table.shape[1],
        )
        found = self._rounds.get(key)
        if found is None:
            control = None
            if is_controlled:
                control = self.control.new_round(batch, self.exit_model.slope)
            found = self._rounds.put(key, ChainRound(key, self.exit_model, pages, control))
        return found
