"""What a drafter is, and the empty one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from specrt.cache import CacheBatch, KVCache
from specrt.draft.length.costs import RoundCost
from specrt.models.launched_run import LaunchedRun
from specrt.models.layer_run import LowerLayers
from specrt.sampling import SamplingTable
from specrt.tree import MAX_NODES, chain
from specrt.types import AcceptResult, DraftTree, Proposal, RoundReport, SequenceState

_RANGES = {"depth": (0, MAX_NODES - 1), "top_k": (1, MAX_NODES), "total_tokens": (1, MAX_NODES)}


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
    """What it reads from the target: hidden states (:meth:`LlamaModel.forward`), or ``"logits"``,
    which a prompt's pass has not."""

    def start(self, state: SequenceState) -> None:
        """A sequence joins, or comes back after it had to give way: ``state.token_ids`` is its
        prompt and what was said so far.

        Raises:
            MemoryError: there is no memory for its draft cache.
        """

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        """The target has run the tokens from position ``start`` on, of all but the last one; taps
        are ``[1, n, H]``."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        """A tree for each sequence, rooted at its last token, of at most ``budget.max_nodes``.

        Of a larger one the first so many nodes are verified. Its tensors are read before the next
        call, which may overwrite them. Other sequences may be asked for before it is observed: what
        belongs to this proposal alone is kept in it, and not in the drafter.

        Raises:
            MemoryError: there is no memory for a draft cache; the sequence goes on undrafted.
        """

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """What came of a proposal; called before the tokens are appended to the states."""

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


@runtime_checkable
class CachingDrafter(Protocol):
    """What a drafter has besides if it keeps keys and values of its own, in pages."""

    @property
    def cache(self) -> KVCache:
        """Where; on the target's device an engine sizes it along with the target's, page by
        page."""


@runtime_checkable
class PrefixDrafter(Protocol):
    """What a drafter has besides if of equal beginnings of sequences it needs only one.

    It keeps by itself what it has of a sequence (:meth:`KVCache.keep`), for those with the same
    ``state.cache_salt``. To a drafter without these methods the target shows every token of a
    prompt, and so runs it, if it reads hidden states; one that reads none is told where the target
    began by its first :meth:`Drafter.prefill`, and may hear of none at all.
    """

    def num_known(self, state: SequenceState, most: int) -> int:
        """How many of a prompt's first tokens, ``most`` at most, it need not see run.

        Asked behind :meth:`Drafter.start`, again where the target has fewer.
        """

    def begin_at(self, state: SequenceState, count: int) -> None:
        """The target runs a prompt from position ``count`` on, which :meth:`num_known` gave.

        Raises:
            MemoryError: there is no memory for its draft cache; the sequence goes on undrafted.
        """


@dataclass(frozen=True)
class BatchTables:
    """A batch as launches of a round find it, at addresses that stay: B rows on the device."""

    history: torch.Tensor
    """``[B, T]`` int32: tokens so far; row b holds ``history_len[b]`` of them."""
    history_len: torch.Tensor
    """``[B]`` int32"""
    max_len: torch.Tensor
    """``[B]`` int32: how long a history may become; 0 once it has ended."""
    roots: torch.Tensor
    """``[B]`` int32: the last tokens."""
    room: torch.Tensor
    """``[B]`` int32: nodes of a tree that there are pages for."""
    num_path: torch.Tensor
    """``[B]`` int32: nodes of the accepted path that are committed."""
    stop_ids: torch.Tensor
    """``[B, S]`` int32"""
    cached: CacheBatch
    """``block_table [B, W]`` and ``kv_len [B]`` of the target's cache."""
    sampling: SamplingTable
    lower: LaunchedRun | None = None
    """The target's first layers, where a plan asked for them; lent while a round is proposed."""


class StageTimes(NamedTuple):
    """Milliseconds that the stages of a launched round took, by the device's own clock."""

    draft: float
    """Until the trees were settled: what the drafter launched."""
    verify: float
    accept: float
    """Acceptance and what follows it, the drafter's part among it."""

    @property
    def whole(self) -> float:
        """Of the round."""
        return self.draft + self.verify + self.accept


class RoundPlan(NamedTuple):
    """What a launched round is to be: equal plans mean the same launches on the same addresses."""

    num_nodes: int
    """M of the proposal, its root included."""
    shape: Hashable = None
    """What else the drafter needs to know of it."""
    num_layers: int = 0
    """Of the target, that the drafter runs over chains of ``num_nodes``, by ``tables.lower``."""


@runtime_checkable
class LaunchedDrafter(Protocol):
    """What a drafter has besides if its rounds are launches alone, which may be captured.

    The host then is a round behind: while it reads what came of one round, the next is under way.
    """

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan | None:
        """What the next round is to be; all of the host's part of it (pages, uploads) is done here.

        Args:
            states: in the order of the batch's rows, as far as reports have been read. One round
                may be under way whose tokens, up to ``budget.max_nodes`` a sequence, are not among
                them. Sequences join, leave and change rows only while none is.
            budget: ``lower`` is not lent.

        Returns:
            The plan, of at most ``budget.max_nodes``; or None: the host is needed, and
            :meth:`Drafter.propose` is asked instead.
        """

    def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
        """Nothing but ops on static tensors of the device, the proposal's own among them.

        Trees of ``plan.num_nodes`` nodes, without ``draft_probs``. A sequence that has ended
        (``max_len`` 0) may be given any.
        """

    def launch_observe(
        self,
        plan: RoundPlan,
        tables: BatchTables,
        tree: DraftTree,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """As :meth:`launch_propose`, behind the commit: ``tables`` hold what was accepted, and
        ``tree`` and ``result`` (without a report) say what."""

    def told(
        self,
        states: Sequence[SequenceState],
        plan: RoundPlan,
        report: RoundReport,
        times: StageTimes,
    ) -> None:
        """What came of a planned round, once the host has read it; before its tokens are appended
        to the states.

        Args:
            states: as for :meth:`plan`; some may have ended since.
            plan: what it gave.
            report: of that round.
            times: that it took.
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


class RootsAlone:
    """Plain decoding in launched rounds."""

    taps: tuple[str, ...] = ()

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan:
        """Roots alone."""
        return RoundPlan(1)

    def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
        """Nothing of a root is read, so any numbers of this shape will do."""
        roots = tables.roots[:, None]
        return Proposal(roots, roots, tables.history_len)

    def launch_observe(
        self,
        plan: RoundPlan,
        tables: BatchTables,
        tree: DraftTree,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        """Nothing is learned."""

    def told(
        self,
        states: Sequence[SequenceState],
        plan: RoundPlan,
        report: RoundReport,
        times: StageTimes,
    ) -> None:
        """Nothing is counted."""
