"""One round of a batch: propose, settle, verify, accept, commit, observe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

from specrt.accept import Accepting, Read
from specrt.cache import CacheBatch, CachedSequence, KVCache
from specrt.device import Device
from specrt.engine.batch import Batch
from specrt.engine.drafting import Drafting
from specrt.engine.edited import EditedAcceptance
from specrt.engine.head_by_need import HeadByNeed
from specrt.engine.reports import Reports, Told
from specrt.engine.walks import Accepted, History, RawLogits
from specrt.models.layer_run import LowerLayers
from specrt.models.model import LlamaModel
from specrt.models.step import FINAL_TAP
from specrt.tree import Settler
from specrt.types import AcceptResult, DraftTree, Proposal, VerifyOutput


@dataclass(frozen=True)
class Round:
    """What came of a round, and what it took."""

    read: Read
    errors: Mapping[int, str]
    """Of rows for which nothing came of it: what was wrong, where that is known."""
    draft_ms: float
    """Proposing, and settling what was proposed."""
    verify_ms: float
    accept_ms: float
    """From logits to the report, and what the drafter makes of it, by the host's clock; logits by
    need are made in it."""
    told: Sequence[Told] = ()
    """What somebody asked to be told of it; empty where nobody did."""


@dataclass(frozen=True)
class Stages:
    """Who does the stages of a round between the drafter's."""

    target: LlamaModel
    cache: KVCache
    """The target's."""
    settler: Settler
    accepting: Accepting
    head: HeadByNeed
    reports: Reports
    edited: EditedAcceptance

    @classmethod
    def of(cls, target: LlamaModel, cache: KVCache) -> Stages:
        """A target's, with its cache."""
        vocab_size, device = target.config.vocab_size, target.device
        settler, accepting = Settler(vocab_size, device), Accepting(vocab_size, device)
        head = HeadByNeed(target)
        edited = EditedAcceptance(head, vocab_size, device)
        return cls(target, cache, settler, accepting, head, Reports(target), edited)

    def verify(
        self, tree: DraftTree, cached: CacheBatch, taps: tuple[str, ...], lower: LowerLayers | None
    ) -> VerifyOutput:
        """The target's pass; without logits where they come by need (:meth:`accept`)."""
        if not self.head.takes(tree, taps):
            return self.target.forward(tree, cached, taps=taps, lower=lower)
        if FINAL_TAP not in taps:
            taps = (*taps, FINAL_TAP)
        return self.target.forward(tree, cached, taps=taps, has_logits=False, lower=lower)

    def accept(self, tree: DraftTree, output: VerifyOutput, batch: Batch) -> Accepted:
        """What comes of :meth:`verify`."""
        if any(request.editor is not None for request in batch.requests):
            return self.edited.accept(tree, output, batch)
        sequences = batch.sampling, batch.history, batch.history_len
        if output.logits.shape[1] == 0:
            return self.head.accept(tree, output.taps[FINAL_TAP], History(*sequences))
        result = self.accepting.accept(tree, output.logits, *sequences)
        return Accepted(result, RawLogits(output.logits))


def run_round(stages: Stages, drafting: Drafting, batch: Batch) -> Round:
    """Run one round. Only the commit changes what a sequence holds.

    The host reads one thing of it, its report: on a GPU all stages but the drafter's own are
    launched before.

    Args:
        stages: the cache has pages for one more row of each sequence, at least.
        drafting: proposes.
        batch: the sequences.

    Raises:
        MemoryError: no memory for buffers of this size. Nothing was committed.
    """
    device = stages.cache.device
    marks = [device.mark()]
    draft = drafting.propose(batch.requests, batch.cached(), batch.roots, batch.cost)
    size = _make_room(stages.cache, batch, draft.proposal, drafting.max_nodes)
    tree = stages.settler.settle(draft.proposal, batch.roots, batch.room, size)
    marks.append(device.mark())
    cached, taps = batch.cached(), drafting.taps(batch.requests)
    output = stages.verify(tree, cached, taps, draft.lower)
    marks.append(device.mark())
    accepted = stages.accept(tree, output, batch)
    result = accepted.result
    rows = batch.append(tree, result)
    cached.move(result.path, batch.num_path)
    marks.append(device.mark())
    seen = device.read(rows).numpy()
    known = perf_counter()  # nothing waits for a GPU behind the report, nor for marks there
    read = Read(seen, tree.draft_tokens.shape[1])
    told_of = stages.reports.of_round(batch.requests, tree, read, accepted.raw.row)
    cached.advance([outcome.num_taken for outcome in read.outcomes])
    if draft.parts:
        told = AcceptResult(
            result.path, result.accept_length, result.tokens, result.logprobs, read.for_drafters()
        )
        drafting.observe(draft, told, {tap: output.taps[tap] for tap in taps})
    draft_ms, verify_ms, accept_ms = (device.ms_between(*pair) for pair in pairwise(marks))
    accept_ms += 1e3 * (perf_counter() - known)
    batch.cost.observe(tree.draft_tokens.numel(), verify_ms + accept_ms)
    return Round(read, accepted.errors, draft_ms, verify_ms, accept_ms, told_of)


def _make_room(cache: KVCache, batch: Batch, proposal: Proposal, most: int) -> int:
    """Pages for each sequence's tree; where there are none left, its tree is cut to what it has.

    Returns:
        Nodes of the largest tree.
    """
    rooms = []
    for request, count in zip(batch.requests, _counts(proposal, cache.device), strict=True):
        assert request.cached is not None, "a request that decodes has pages"
        rooms.append(_reserved(cache, request.cached, min(max(count, 1), most)))
    batch.set_room(rooms)
    return max(rooms)


def _reserved(cache: KVCache, held: CachedSequence, wanted: int) -> int:
    try:
        cache.reserve(held, held.length + wanted)
        return wanted
    except MemoryError:
        return len(held.pages) * cache.page_size - held.length


def _counts(proposal: Proposal, device: Device) -> Sequence[int]:
    """Nodes that trees may have: what the host can know of them without waiting."""
    if device.is_gpu and device.holds(proposal.num_nodes):
        return [proposal.draft_tokens.shape[1]] * len(proposal.num_nodes)
    counts: list[int] = proposal.num_nodes.tolist()
    return counts
