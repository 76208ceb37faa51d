"""Rounds that are launches alone: captured once, launched from then on, read one round late.

Where the drafter is such (:class:`~specrt.draft.base.LaunchedDrafter`) no stage of a round needs
the host: it launches the next round, and then reads what came of the one before, while the GPU
works. So what the host knows of a sequence may be one round old. A sequence that has ended
meanwhile takes part in that round and takes nothing from it; pages are there for both rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from specrt import ops
from specrt.accept import Read, accept, empty_maxima, empty_result, gpu_scratch
from specrt.device import Device, Posted
from specrt.draft.base import BatchTables, StageTimes
from specrt.engine.batch import Batch, launch_append, report_shape
from specrt.engine.drafting import Drafting, Planned
from specrt.engine.request import Request
from specrt.engine.round import Round, Stages
from specrt.models.launched_run import LaunchedRun
from specrt.reuse import Recent
from specrt.sampling import SamplingTable
from specrt.tree import empty_tree, launch_settle
from specrt.types import DraftTree, Proposal

_NUM_MOMENTS = 4
_MAX_ROUNDS = 64  # whose buffers are kept: those of the sizes that came up last


class _Record:
    """What the host reads of a round, in one memory that is copied at once.

    Args:
        report: shape ``[B, R]`` of the sequences' reports.
        device: where to.
    """

    def __init__(self, report: tuple[int, int], device: Device) -> None:
        self._shape = report
        num_words = _NUM_MOMENTS * torch.int64.itemsize // torch.int32.itemsize
        self.words = device.zeros(num_words + prod(report), dtype=torch.int32)
        moments, self.report = self._parts(self.words)
        self.moments = moments.split(1)
        """Of the device's clock: at the beginning, and behind each stage."""

    def parts(self, posted: Posted) -> tuple[StageTimes, npt.NDArray[np.int32]]:
        """How long the stages took, and the report; once the copy is there."""
        moments, report = self._parts(posted.read())
        times = moments.numpy()
        return StageTimes(*(times[1:] - times[:-1]) * 1e-6), report.numpy()

    def _parts(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_words = len(words) - prod(self._shape)
        return words[:num_words].view(torch.int64), words[num_words:].view(self._shape)


@dataclass(frozen=True, eq=False)
class _LaunchedRound:
    """A round of given sizes on given addresses; what it holds lives as long as its graph."""

    launch: Callable[[], None]
    record: _Record


@dataclass(frozen=True)
class Pending:
    """A round that was launched and not read."""

    requests: tuple[Request, ...]
    """In the order of its rows."""
    planned: Planned
    record: _Record
    posted: Posted
    """A copy of the record, on its way."""


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
        cached.expect_move()
        device.run(found, found.launch)
        return Pending(requests, planned, found.record, device.post(found.record.words))

    def read(self, pending: Pending, batch: Batch, *, is_ahead: bool) -> Round:
        """What came of a round, once it is done.

        Args:
            pending: the oldest one that was launched and not read.
            batch: its sequences.
            is_ahead: whether another one was launched behind it.
        """
        times, report = pending.record.parts(pending.posted)
        read = Read(report, pending.planned.plan.num_nodes)
        counts = [outcome.num_taken for outcome in read.outcomes]
        batch.advance(counts, is_ahead=is_ahead)
        self._drafting.told(pending.planned, pending.requests, read.for_drafters(), times)
        # (As in rounds that the host takes part in.)
        verified_ms = times.verify + times.accept
        batch.cost.observe(pending.planned.plan.num_nodes * len(counts), verified_ms)
        return Round(read, {}, *times)

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
        record = _Record(report_shape(result), device)
        scratch = self._scratch(tree)
        maxima = None
        if stages.target.has_maxima:
            maxima = empty_maxima(tree, sampling, tables.history_len)
        tables = replace(tables, lower=self._lower(planned, tables))
        bind = partial(stages.target.bind, tree, tables.cached, taps=planned.taps, maxima=maxima)
        whole, upper = bind(), None
        if tables.lower is not None and tables.lower.gives(planned.taps):
            upper = bind(run=tables.lower)

        def launch() -> None:
            begun, drafted, verified, ended = record.moments
            ops.time_stamp(begun)
            proposal, is_run = _proposed(planned, tables)
            launch_settle(proposal, tables.roots, tables.room, vocab_size, tree)
            ops.time_stamp(drafted)
            verify = whole if upper is None or not is_run else upper
            verify.launch()
            ops.time_stamp(verified)
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
            launch_append(tables, tree, result, record.report)
            tables.cached.launch_move(result.path, tables.num_path)
            taps = verify.output.taps
            with _drafting():
                planned.drafter.launch_observe(planned.plan, tables, tree, result, taps)
            ops.time_stamp(ended)

        return _LaunchedRound(launch, record)

    def _lower(self, planned: Planned, tables: BatchTables) -> LaunchedRun | None:
        """The target's first layers, to be lent where a plan asks for them."""
        num_nodes, num_layers = planned.plan.num_nodes, planned.plan.num_layers
        if num_layers == 0:
            return None
        target, cached = self._stages.target, tables.cached
        return LaunchedRun(target, cached, tables.roots, num_layers, num_nodes - 1)


def _proposed(planned: Planned, tables: BatchTables) -> tuple[Proposal, bool]:
    """What a drafter launched, and whether the layers that it was lent have run all of it."""
    lower = tables.lower
    with _drafting(), nullcontext() if lower is None else lower.lent():
        proposal = planned.drafter.launch_propose(planned.plan, tables)
    assert proposal.draft_probs is None, "a launched drafter gives no laws"
    run = None if lower is None else lower.taken(proposal)
    return (proposal, False) if run is None else (run, True)


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
    parts += [*tables.cached.block_tables, tables.cached.kv_len]
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.append((part.data_ptr(), part.shape, part.stride()))
        elif not isinstance(part, SamplingTable):
            found.append(id(part))
    return found
