"""The engine's step: who joins, a piece of a prompt, a round of all that decode, who leaves.

One thread at a time; :class:`specrt.engine.engine.Engine` sees to that, and talks to users.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from specrt.cache import CacheBatch
from specrt.draft.base import Drafter
from specrt.engine.batch import Batch
from specrt.engine.drafting import Drafting
from specrt.engine.fault import DeviceWatch
from specrt.engine.launched import LaunchedRounds, Pending
from specrt.engine.memory import make_cache
from specrt.engine.request import Request
from specrt.engine.results import StreamChunk
from specrt.engine.round import Round, Stages, run_round
from specrt.engine.scheduler import Scheduler
from specrt.models.model import LlamaModel
from specrt.tree import MAX_NODES


@dataclass(frozen=True)
class EngineLimits:
    """What an engine holds and does at once.

    Raises:
        ValueError: a field is out of range; names it.
    """

    max_batch: int = 8
    """Requests that are answered at the same time; further ones wait."""
    max_nodes: int = 64
    """The largest tree that is verified, its root included."""
    prefill_chunk: int = 512
    """Tokens of prompts that are run between two rounds of those that decode."""
    max_cached_tokens: int | None = None
    """Tokens of all sequences whose keys and values are held, in whole pages; who came last gives
    way where they run out. Of layers that see a window this holds by itself, of what they keep.
    None: as memory allows."""
    max_waiting: int | None = None
    """Requests that may wait for a place; None: any number."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_batch", 1, None),
            ("max_nodes", 1, MAX_NODES),
            ("prefill_chunk", 1, None),
            ("max_cached_tokens", 1, None),
            ("max_waiting", 1, None),
        ):
            value = getattr(self, name)
            is_int = isinstance(value, int) and not isinstance(value, bool)
            is_none = value is None and name in ("max_cached_tokens", "max_waiting")
            if is_none or (is_int and value >= least and (most is None or value <= most)):
                continue
            bounds = f"at least {least}" if most is None else f"{least}..{most}"
            raise ValueError(f"{name}: expected {bounds}, got {value!r}")


class EngineCore:
    """A target, a drafter and the sequences that are being answered.

    Args:
        target: the model whose words are spoken.
        drafter: proposes; never changes the words.
        limits: how much at once.
    """

    def __init__(self, target: LlamaModel, drafter: Drafter, limits: EngineLimits) -> None:
        self._target = target
        self._limits = limits
        self.cache = make_cache(target, drafter, limits)
        vocab_size = target.config.vocab_size
        self._drafting = Drafting(drafter, target, limits.max_nodes)
        self._batch = Batch(self.cache, limits.max_batch, vocab_size)
        self._stages = Stages.of(target, self.cache)
        self._launched = LaunchedRounds(self._stages, self._drafting)
        self._pending: Pending | None = None  # launched, and not read
        self.scheduler = Scheduler(limits.max_batch, limits.max_waiting, self._has_room)
        self._must_start_over = False
        self.device = DeviceWatch(target.device)

    def add(self, request: Request) -> None:
        """A request waits for its turn.

        Raises:
            QueueFullError: no further one may wait.
            RuntimeError: the device is lost.
        """
        self.device.require()
        self.scheduler.add(request)

    def step(self) -> None:
        """Run a piece of the prompts of those that wait for it, and a round of those that decode.

        What comes of it is delivered request by request. If it is interrupted or fails as a whole,
        no request is lost: all wait again and are taken up from their tokens. If the device is
        lost, all end and are told why, and there are no further steps.
        """
        if self.device.fault is not None:
            self._fail_all()  # who came in between, or whom an interrupt kept from hearing of it
            return
        if self._must_start_over:  # interrupted in the midst of it
            self._start_over()
        try:
            with self.device.working():
                self._prefill()
                if len(self._batch):
                    self._round()
        except BaseException as error:
            if self.device.is_lost(error):
                self._fail_all()
                return
            self._must_start_over = True
            self._start_over()
            raise

    def end(self, request: Request, last: StreamChunk) -> None:
        """Tell a request's last chunk and forget it."""
        request.tell(last)  # first: interrupted, it is removed later, and never told twice
        self.remove(request)

    def remove(self, request: Request) -> None:
        """Free what a request holds, however far it has come, and forget it.

        It is forgotten last: interrupted, it is found again while anything of it is left.
        """
        request.is_over = True
        try:
            with self.device.working():
                self._catch_up()
                self._release(request)
            self.scheduler.remove(request)
        except BaseException:
            self._must_start_over = True
            self._start_over()
            raise

    def close(self) -> None:
        """Free everything, at once: nothing here holds on to the target afterwards."""
        try:
            with self.device.working():
                for request in list(self.scheduler):
                    self.remove(request)
                self.cache.retire()
        except Exception as error:
            if not self.device.is_lost(error):  # or its memory is gone anyway
                raise
        del self._target, self._stages, self._drafting, self._batch, self.scheduler, self.cache
        del self._launched

    # --- pages --------------------------------------------------------------------------------

    def _has_room(self, request: Request) -> bool:
        limits, num_tokens = self._limits, len(request.token_ids)
        num_rows = max(limits.prefill_chunk, limits.max_nodes)
        return self.cache.can_hold(num_tokens + limits.max_nodes, num_rows)

    def _reserve(self, request: Request, num_tokens: int) -> bool:
        """Pages for an admitted request; False if it had to give way, or to end, itself.

        Whoever came last gives way, by giving up its pages and being computed again later.
        """
        while request.cached is not None:
            try:
                self.cache.reserve(request.cached, num_tokens)
                return True
            except MemoryError as error:
                if not self._make_way(request, error):
                    return False
        return False

    def _make_way(self, request: Request, error: MemoryError) -> bool:
        """Somebody gives memory back; False if it was the request itself."""
        if self._pending is not None:  # and pages may be free then
            self._catch_up()
            return not request.is_over
        admitted = self.scheduler.admitted
        if len(admitted) == 1:
            self._fail(request, str(error))
            return False
        self._preempt(admitted[-1])
        return admitted[-1] is not request

    def _preempt(self, request: Request) -> None:
        """All it keeps is its tokens: the noise is a counter, so they are what they would be."""
        self._release(request)
        self.scheduler.preempt(request)

    def _release(self, request: Request) -> None:
        with ExitStack() as releases:
            releases.callback(self._close, request)
            releases.callback(self._drafting.finish, request)
            if self.device.fault is None:  # or nothing can be written to the batch's tables
                self._batch.leave(request)
            self._drafting.regroup()

    def _close(self, request: Request) -> None:
        if request.cached is not None:
            self.cache.close(request.cached)
            request.cached = None

    def _start_over(self) -> None:
        """After an interrupt nobody knows which of a round's writes were made: what users have been
        told is what there is, and all go on from there."""
        self._pending = None
        for request in list(self.scheduler):
            if request.is_over:
                self.remove(request)
        with self.device.working():
            for request in reversed(self.scheduler.admitted):
                request.forget_untold()  # first: interrupted, it is still to be done again
                self._preempt(request)
            self._batch.clear()
        self._drafting.take_restarts()  # all have been
        self._must_start_over = False

    # --- prompts ------------------------------------------------------------------------------

    def _prefill(self) -> None:
        """Run at most a chunk of prompts; those that are through join the batch."""
        left = self._limits.prefill_chunk
        while left > 0:
            request = self._next_to_prefill()
            if request is None:
                return
            left -= self._prefill_piece(request, left)

    def _next_to_prefill(self) -> Request | None:
        decoding = self._batch.requests
        for request in self.scheduler.admitted:
            if request not in decoding:
                return request
        admitted = self.scheduler.admit()
        if admitted is not None:
            admitted.cached = self.cache.open()
            self._drafting.start(admitted)
        return admitted

    def _prefill_piece(self, request: Request, most: int) -> int:
        """Run up to ``most`` tokens of a prompt; how many there were, at least one for the way."""
        count = min(most, request.num_to_prefill)
        held = request.cached
        assert held is not None, "an admitted request has a place for pages"
        if not self._reserve(request, held.length + count):
            return 1
        device, first = self._target.device, held.length
        started = device.mark()
        try:
            self._extend(request, first, first + count)
        except Exception as error:
            if self.device.is_lost(error):
                raise
            self._fail(request, f"{type(error).__name__}: {error}")
            return max(1, count)
        request.prefills.append((started, device.mark()))
        if request.num_to_prefill == 0:
            self._catch_up()
            self._batch.join(request)
            self._drafting.regroup()
        return max(1, count)

    def _extend(self, request: Request, first: int, end: int) -> None:
        assert request.cached is not None, "an admitted request has a place for pages"
        batch = CacheBatch(self.cache, [request.cached])
        ids, taps = request.token_ids[first:end], self._drafting.taps([request])
        for start, piece in self._target.extend(ids, batch, taps=taps):
            self._drafting.prefill(request, first + start, piece)
        self.cache.release(request.cached)  # a chunk's pages are many

    # --- rounds -------------------------------------------------------------------------------

    def _round(self) -> None:
        if self._launch_round():
            return
        self._catch_up()
        for request in list(self._batch.requests):
            if request.cached is not None:  # or it has given way to an older one by now
                self._reserve(request, request.cached.length + 1)
        if not len(self._batch):
            return
        try:
            done = run_round(self._stages, self._drafting, self._batch)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._shrink(error)
            return
        self._deliver(list(self._batch.requests), done)

    def _launch_round(self) -> bool:
        """Launch a round, then read the one before; whether there was one to launch."""
        decoding = self._batch.requests
        planned = self._drafting.plan(decoding) if self._target.device.is_gpu else None
        if planned is None or not self._reserve_ahead(planned.plan.num_nodes):
            return False
        before = self._pending
        try:
            self._pending = self._launched.launch(planned, self._batch, before)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._shrink(error)
            return True
        except Exception as error:
            if self.device.is_lost(error) or not planned.is_drafted:
                raise
            self._drafting.blame(decoding, error)
            self._start_over()
            return True
        if before is not None:
            self._take(before)
        return True

    def _reserve_ahead(self, num_nodes: int) -> bool:
        """Pages for a round and for what the one that is under way may commit; False if there are
        none left."""
        unread = 0 if self._pending is None else self._pending.planned.plan.num_nodes
        try:
            for request in self._batch.requests:
                assert request.cached is not None, "a request that decodes has pages"
                self.cache.reserve(request.cached, request.cached.length + unread + num_nodes)
        except MemoryError:
            return False
        return True

    def _catch_up(self) -> None:
        """Read the round that is under way, if there is one: the tables may be edited then."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._take(pending)

    def _take(self, pending: Pending) -> None:
        done = self._launched.read(pending, self._batch, is_ahead=self._pending is not None)
        self._deliver(pending.requests, done)

    def _deliver(self, requests: Sequence[Request], done: Round) -> None:
        """Tell all what a round gave them; those that end leave once all have been told."""
        running = [(row, request) for row, request in enumerate(requests) if not request.is_over]
        ended = [request for row, request in running if self._advance(request, row, done)]
        for request in ended:
            self.remove(request)
        restarts = self._drafting.take_restarts()
        if restarts:
            self._catch_up()  # before anybody is looked at: some may end by it
        for request in restarts:
            if request.cached is not None:
                self._preempt(request)

    def _shrink(self, error: Exception) -> None:
        """There was no memory for a round of this many: all are taken up again, one fewer."""
        decoding = list(self._batch.requests)
        if len(decoding) == 1:
            self._fail(decoding[0], str(error))
        else:
            self.scheduler.max_batch = len(decoding) - 1
        self._start_over()

    def _advance(self, request: Request, row: int, done: Round) -> bool:
        """Append a sequence's new tokens and tell of it; whether it has ended."""
        try:
            chunk = self._chunk(request, row, done)
        except Exception as error:  # its tokenizer's, maybe
            chunk = request.failed(f"{type(error).__name__}: {error}")
        request.tell(chunk)
        return chunk.result is not None

    def _chunk(self, request: Request, row: int, done: Round) -> StreamChunk:
        outcome, stats, device = done.read.outcomes[row], request.stats, self._target.device
        # All that came before a round is done where the round is.
        for marks in request.prefills:
            stats.prefill_ms += device.ms_between(*marks)
        request.prefills.clear()
        stats.draft_ms += done.draft_ms
        stats.verify_ms += done.verify_ms
        stats.accept_ms += done.accept_ms
        if outcome.accept_length < 0:
            position = len(request.token_ids)
            return request.failed(f"logits: NaN or no finite value at position {position}")
        count, logprobs = outcome.num_taken, done.read.logprobs
        taken = request.append(
            done.read.tokens[row][:count], None if logprobs is None else logprobs[row][:count]
        )
        has_ended = request.end.reason is not None
        assert has_ended or not outcome.ending, "an end that the text does not have"
        stats.record(outcome.num_nodes, len(taken) - 1, outcome.deepest)
        return request.chunk(taken, outcome.accept_length)

    def _fail_all(self) -> None:
        """End all requests: their device is lost."""
        self._pending = None
        for request in list(self.scheduler):
            self._fail(request, f"GPU lost: {self.device.fault}")

    def _fail(self, request: Request, error: str) -> None:
        """End one request alone, and say why."""
        self.end(request, request.failed(error))
