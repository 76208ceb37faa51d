"""One round of a batch: propose, settle, verify, accept, commit, observe."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

from specrt.accept import accept
from specrt.cache import KVCache
from specrt.engine.batch import Batch
from specrt.engine.drafting import Drafting
from specrt.models.model import LlamaModel
from specrt.tree import Settler


@dataclass(frozen=True)
class RoundReport:
    """What the host learns of a round, row by row; small enough to be read in one piece."""

    num_nodes: list[int]
    """Of each tree, its root included."""
    depths: list[list[int]]
    """``[B][N]``: distance from the root of each node."""
    accept_lengths: list[int]
    """Accepted draft tokens; -1 where logits were NaN."""
    tokens: list[list[int]]
    """``[B][D + 1]``: accepted tokens, then the bonus token; padded."""
    logprobs: list[list[float]] | None
    draft_ms: float
    verify_ms: float
    accept_ms: float


def run_round(
    target: LlamaModel, cache: KVCache, drafting: Drafting, settler: Settler, batch: Batch
) -> RoundReport:
    """Run one round. Only the commit changes what a sequence holds.

    Args:
        target: verifies.
        cache: the target's; has pages for one more row of each sequence, at least.
        drafting: proposes.
        settler: makes trees of what was proposed.
        batch: the sequences.

    Raises:
        MemoryError: no memory for buffers of this size. Nothing was committed.
    """
    times = [perf_counter()]
    draft = drafting.propose(batch.requests, batch.cached(), batch.roots)
    _make_room(cache, batch, draft.proposal.num_nodes.tolist(), drafting.max_nodes)
    tree = settler.settle(draft.proposal, batch.roots, batch.room)
    times.append(perf_counter())
    cached, taps = batch.cached(), drafting.taps(batch.requests)
    output = target.forward(tree, cached, taps=taps, lower=draft.lower)
    times.append(perf_counter())
    result = accept(
        tree,
        output.logits,
        batch.sampling,
        batch.history,
        batch.history_len,
        want_logprobs=batch.sampling.want_logprobs,
    )
    cached.commit(result.path, result.accept_length + 1)
    # Read before the drafter has the tensors: it may write to them.
    lengths, tokens = result.accept_length.tolist(), result.tokens.tolist()
    logprobs = None if result.logprobs is None else result.logprobs.tolist()
    drafting.observe(draft, result, output.taps)
    times.append(perf_counter())
    draft_ms, verify_ms, accept_ms = (1e3 * (b - a) for a, b in pairwise(times))
    drafting.cost.observe(tree.draft_tokens.numel(), verify_ms + accept_ms)
    return RoundReport(
        num_nodes=tree.num_nodes.tolist(),
        depths=tree.depth.tolist(),
        accept_lengths=lengths,
        tokens=tokens,
        logprobs=logprobs,
        draft_ms=draft_ms,
        verify_ms=verify_ms,
        accept_ms=accept_ms,
    )


def _make_room(cache: KVCache, batch: Batch, num_nodes: list[int], most: int) -> None:
    """Pages for each sequence's tree; where there are none left, its tree is cut to what it has."""
    for row, request in enumerate(batch.requests):
        held = request.cached
        assert held is not None, "a request that decodes has pages"
        wanted = min(max(num_nodes[row], 1), most)
        try:
            cache.reserve(held, held.length + wanted)
        except MemoryError:
            wanted = len(held.pages) * cache.page_size - held.length
        batch.set_room(row, wanted)
