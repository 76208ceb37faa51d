"""A small model beside its target on a GPU, whose rounds may be launches alone.

Trees then have the nodes of the highest probability, of as many as there are in whole levels, and
where the temperature is above 0 they are ranked with the noise that the target draws with
(``ops.tree_expand``). They are as deep near an output's end as elsewhere, which the host would
learn too late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from specrt.cache import CacheBatch
from specrt.draft.base import BatchTables, Budget, RoundPlan, StageTimes
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.draft.small_model.round import TreeKey, TreeRound
from specrt.models.model import LlamaModel
from specrt.reuse import Recent
from specrt.tree import MAX_NODES
from specrt.types import AcceptResult, DraftTree, Proposal, RoundReport, SequenceState

_MAX_ROUNDS = 32  # kinds of round whose buffers are kept


class DeviceSmallModelDrafter(SmallModelDrafter):
    """As :class:`SmallModelDrafter`, without trees that are drawn.

    Where the host is needed (a history shorter than what a round runs of it, a context that ends)
    a round is proposed and observed as on the CPU.

    Args:
        model: as there; on a GPU.
        depth: as there.
        width: as there.
        vocab_size: as there.
    """

    def __init__(
        self,
        model: LlamaModel,
        depth: int = 4,
        width: int = 1,
        *,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(model, depth, width, vocab_size=vocab_size)
        self._pages = CacheBatch(self._cache)
        self._rounds: Recent[TreeKey, TreeRound] = Recent(_MAX_ROUNDS)

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan | None:
        """Pages for a tree and for what is accepted meanwhile, and the buffers of such a round."""
        params = budget.params
        room = min(budget.max_nodes, params.total_tokens or MAX_NODES, MAX_NODES) - 1
        depth = self._depth if params.depth is None else params.depth
        width = min(params.top_k or self._width, room)
        if width < 1 or depth < 1:
            return None
        depth = min(depth, room // width)
        # One round may be under way, planned as this one is: its tree's depth, and the bonus token.
        num_tail = depth + 1
        longest = max(len(state.token_ids) for state in states) + num_tail
        if not all(self._is_near(state, num_tail) for state in states):
            return None
        if longest + depth > self._model.config.max_positions:
            return None
        try:
            for state in states:
                ahead = num_tail + depth * width
                self._cache.reserve(self._cached[state], len(state.token_ids) + ahead)
        except MemoryError:  # a round at a time needs less
            return None
        self._pages.update([self._cached[state] for state in states])
        is_coupled = any(state.temperature > 0 for state in states)
        made = self._round((len(states), num_tail, depth, width, is_coupled))
        return RoundPlan(made.key.num_nodes, made)

    def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
        """Catch up with the accepted tokens, then grow the trees depth by depth."""
        assert isinstance(plan.shape, TreeRound)
        return plan.shape.launch(tables)

    def launch_observe(
        self,
        plan: RoundPlan,
        tables: BatchTables,
        tree: DraftTree,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """The next round runs what was accepted."""

    def told(
        self,
        states: Sequence[SequenceState],
        plan: RoundPlan,
        report: RoundReport,
        times: StageTimes,
    ) -> None:
        """What the round had caught up with is there for good."""
        for state in states:
            cached = self._cached.get(state)
            if cached is not None:
                cached.length = len(state.token_ids)

    def _is_near(self, state: SequenceState, num_tail: int) -> bool:
        """Whether the last so many tokens are all that its cache may lack.

        A round that is under way leaves at most its tree's depth and the bonus token, and it was
        planned as this one is.
        """
        length = len(state.token_ids)
        return length >= num_tail and length - self._cached[state].length <= num_tail

    def _round(self, sizes: tuple[int, int, int, int, bool]) -> TreeRound:
        batch, num_tail, _, width, _ = sizes
        device, pages = self._device, self._pages
        self._model.reserve(batch, max(num_tail, width), pages.num_positions)
        table = pages.block_table
        key = TreeKey(*sizes, device.version, table.data_ptr(), table.shape[1])
        found = self._rounds.get(key)
        if found is None:
            made = TreeRound(key, self._model, pages, self._num_shared)
            found = self._rounds.put(key, made)
        return found
