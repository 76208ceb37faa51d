"""Rounds that are launches alone: captured once, launched from then on, read one round late.

Where the drafter is such (:class:`~specrt.draft.base.LaunchedDrafter`) no stage of a round needs
the host: it launches the next round, and then reads what came of the one before, while the GPU
works. So what the host knows of a sequence may be one round old. A sequence that has ended
meanwhile takes part in that round and takes nothing from it; pages are there for both rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from specrt.accept import Read, accept, empty_maxima, empty_result, gpu_scratch
from specrt.device import Mark, Posted
from specrt.draft.base import BatchTables, StageTimes
from specrt.engine.batch import Batch, empty_report, launch_append
from specrt.engine.drafting import Drafting, Planned
from specrt.engine.request import Request
from specrt.engine.round import Round, Stages
from specrt.reuse import Recent
from specrt.sampling import SamplingTable
from specrt.tree import empty_tree, launch_settle
from specrt.types import DraftTree

_MAX_ROUNDS = 64  # whose buffers are kept: those of the sizes that came up last


@dataclass(frozen=True, eq=False)
class _LaunchedRound:
    """A round of given sizes on given addresses; what it holds lives as long as its graph."""

    launch: Callable[[], None]
    report: torch.Tensor


@dataclass(frozen=True)
class Pending:
    """A round that was launched and not read."""

    requests: tuple[Request, ...]
    """In the order of its rows."""
    planned: Planned
    report: Posted
    marks: tuple[Mark, Mark]


class LaunchedRounds:
    """Launches rounds and reads them.

    Args:
        stages: who does what.
        drafting: plans.
    """

    def __init__(self, stages: Stages, drafting: Drafting) -> None:
        self._stages = stages
        self._drafting = drafting
        self._device = stages.cache.device
        self._rounds: Recent[Hashable, _LaunchedRound] = Recent(_MAX_ROUNDS)
        self._scratches: dict[tuple[int, int], torch.Tensor] = {}
        self._version = self._device.version

    def launch(self, planned: Planned, batch: Batch, before: Pending | None) -> Pending:
        """Launch a round; nobody waits.

        Args:
            planned: what is to be launched.
            batch: whose sequences have pages for it, and for the one before.
            before: the round that was launched last, if nobody has read it yet.

        Raises:
            MemoryError: no memory for buffers of this size. Nothing was launched.
        """
        device, requests = self._device, tuple(batch.requests)
        num_unread = 0 if before is None else before.planned.plan.num_nodes
        batch.set_room([planned.plan.num_nodes] * len(requests), num_unread=num_unread)
        cached = batch.cached(is_ahead=before is not None)
        found = self._round(planned, batch)
        start = device.mark()
        cached.expect_move()
        device.run(found, found.launch)
        end = device.mark()
        return Pending(requests, planned, device.post(found.report), (start, end))

    def read(self, pending: Pending, batch: Batch, *, is_ahead: bool) -> Round:
        """What came of a round, once it is done.

        Args:
            pending: the oldest one that was launched and not read.
            batch: its sequences.
            is_ahead: whether another one was launched behind it.
        """
        read = Read(pending.report.read().numpy(), pending.planned.plan.num_nodes)
        counts = [outcome.num_taken for outcome in read.outcomes]
        batch.advance(counts, is_ahead=is_ahead)
        ms = self._device.ms_between(*pending.marks)
        times = StageTimes(0.0, ms, 0.0)
        self._drafting.told(pending.planned, pending.requests, read.for_drafters(), times)
        self._drafting.cost.observe(pending.planned.plan.num_nodes * len(counts), ms)
        return Round(read, draft_ms=0.0, verify_ms=ms, accept_ms=0.0)

    def _round(self, planned: Planned, batch: Batch) -> _LaunchedRound:
        tables = batch.tables
        key = (planned, tables.sampling.want_logprobs, *_addresses(tables))
        found = None if self._are_stale() else self._rounds.get(key)
        if found is None:
            found = self._made(planned, tables)
            self._are_stale()  # making it may have moved what others hold
            self._rounds.put(key, found)
        return found

    def _are_stale(self) -> bool:
        """Whether rounds were forgotten, as buffers have moved."""
        if self._version == self._device.version:
            return False
        self._rounds.clear()
        self._version = self._device.version
        return True

    def _scratch(self, tree: DraftTree) -> torch.Tensor:
        """Acceptance's, of a size. Rounds share it: they follow one another, and leave in it what
        the next of that size needs."""
        batch, num_nodes = tree.draft_tokens.shape
        found = self._scratches.get((batch, num_nodes))
        if found is None:
            vocab_size = self._stages.target.config.vocab_size
            found = gpu_scratch(tree, vocab_size, self._device)
            self._scratches[batch, num_nodes] = found
        return found

    def _made(self, planned: Planned, tables: BatchTables) -> _LaunchedRound:
        """A round's own buffers, and its launches on them."""
        stages, device, sampling = self._stages, self._device, tables.sampling
        vocab_size = stages.target.config.vocab_size
        tree = empty_tree(len(tables.roots), planned.plan.num_nodes, device)
        result = empty_result(tree, sampling.want_logprobs)
        report = empty_report(result, device)
        scratch = self._scratch(tree)
        maxima = empty_maxima(tree, sampling, tables.history_len)
        verify = stages.target.bind(tree, tables.cached, taps=planned.taps, maxima=maxima)

        def launch() -> None:
            with _drafting():
                proposal = planned.drafter.launch_propose(planned.plan, tables)
            assert proposal.draft_probs is None, "a launched drafter gives no laws"
            launch_settle(proposal, tables.roots, tables.room, vocab_size, tree)
            verify.launch()
            accept(
                tree,
                verify.output.logits,
                sampling,
                tables.history,
                tables.history_len,
                want_logprobs=sampling.want_logprobs,
                workspace=scratch,
                out=result,
                maxima=maxima,
            )
            launch_append(tables, tree, result, report)
            tables.cached.launch_move(result.path, tables.num_path)
            taps = verify.output.taps
            with _drafting():
                planned.drafter.launch_observe(planned.plan, tables, tree, result, taps)

        return _LaunchedRound(launch, report)


@contextmanager
def _drafting() -> Iterator[None]:
    """A drafter that finds no memory has failed: it is not the round that is too large."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _addresses(tables: BatchTables) -> list[Hashable]:
    """Where a batch's tensors lie, and their sizes: what tells its rounds from others'."""
    found: list[Hashable] = []
    parts = [getattr(tables, field.name) for field in fields(tables)]
    parts += [getattr(tables.sampling, name) for name in ("rows", "bias_ids")]
    parts += [tables.cached.block_table, tables.cached.kv_len]
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.append((part.data_ptr(), *part.shape))
        elif not isinstance(part, SamplingTable):
            found.append(id(part))
    return found
