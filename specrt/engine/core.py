"""The engine's step: who joins, a piece of a prompt, a round of all that decode, who leaves.

One thread at a time; :class:`specrt.engine.engine.Engine` sees to that, and talks to users.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specrt.draft.base import Drafter
from specrt.engine.batch import Batch
from specrt.engine.batches import Batches
from specrt.engine.drafting import Drafting
from specrt.engine.fault import DeviceWatch
from specrt.engine.launched import LaunchedRounds, Pending
from specrt.engine.limits import EngineLimits
from specrt.engine.memory import make_cache, shared_cache
from specrt.engine.places import Places
from specrt.engine.prefill import Prefill
from specrt.engine.reports import Told
from specrt.engine.request import Request
from specrt.engine.results import EngineStats, StreamChunk
from specrt.engine.round import Round, Stages, run_round
from specrt.models.model import LlamaModel


class EngineCore:
    """A target, a drafter and the sequences that are being answered.

    Args:
        target: the model whose words are spoken.
        drafter: proposes; never changes the words.
        limits: how much at once.
    """

    def __init__(self, target: LlamaModel, drafter: Drafter, limits: EngineLimits) -> None:
        self._target = target
        self.cache = make_cache(target, drafter, limits)
        vocab_size = target.config.vocab_size
        self._drafting = Drafting(drafter, target, limits.max_nodes)
        self._batches = Batches(self.cache, limits.max_batch, vocab_size)
        self._stages = Stages.of(target, self.cache)
        self._launched = LaunchedRounds(self._stages, self._drafting)
        self._pending: Pending | None = None  # launched, and not read
        self._must_start_over = False
        self.device = DeviceWatch(target.device)
        parts = self._batches, self._drafting, self.device, self._catch_up, self._fail
        self._places = Places(self.cache, shared_cache(drafter), limits, *parts)
        self.scheduler = self._places.scheduler
        self._prefill = Prefill(target, limits, self._places, self._stages.reports, *parts)

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
                self._prefill.run()
                for batch in self._batches:
                    self._round(batch)
        except BaseException as error:
            if self.device.is_lost(error):
                self._fail_all()
                return
            self._must_start_over = True
            self._start_over()
            raise

    @property
    def stats(self) -> EngineStats:
        """What there is now."""
        scheduler, cache, places = self.scheduler, self.cache, self._places
        return EngineStats(
            num_running=len(scheduler.admitted),
            num_waiting=scheduler.num_waiting,
            num_pages=cache.num_pages,
            num_held_pages=cache.num_held_pages,
            num_shared_pages=cache.num_shared_pages,
            prefix_queries=places.num_looked_up,
            prefix_hits=places.num_found,
        )

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
                self._places.release(request, is_sound=not self._must_start_over)
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
                self._places.close()
                self.cache.retire()
        except Exception as error:
            if not self.device.is_lost(error):  # or its memory is gone anyway
                raise
        del self._target, self._stages, self._drafting, self._batches, self.scheduler, self.cache
        del self._launched, self._places, self._prefill

    # --- what goes wrong ------------------------------------------------------------------------

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
                self._places.preempt(request, is_sound=False)
            self._batches.clear()
        self._drafting.take_restarts()  # all have been
        self._must_start_over = False

    # --- rounds -------------------------------------------------------------------------------

    def _round(self, batch: Batch) -> None:
        if batch is self._batches.launched:
            if self._launch_round(batch):
                return
            self._catch_up()
        for request in list(batch.requests):
            if request.cached is not None:  # or it has given way to an older one by now
                self._places.reserve(request, request.cached.length + 1)
        if not len(batch):
            return
        try:
            done = run_round(self._stages, self._drafting, batch)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._shrink(error)
            return
        self._prefill.pace.observe_round(done.draft_ms + done.verify_ms + done.accept_ms)
        self._deliver(list(batch.requests), done)

    def _launch_round(self, batch: Batch) -> bool:
        """Launch a round, then read the one before; whether there was one to launch."""
        decoding, planned = batch.requests, None
        if self._target.device.is_gpu:
            planned = self._drafting.plan(decoding, batch.cost)
        if planned is None or not self._reserve_ahead(planned.plan.num_nodes):
            return False
        before = self._pending
        try:
            self._pending = self._launched.launch(planned, batch, before)
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
            for request in self._batches.launched.requests:
                assert request.cached is not None, "a request that decodes has pages"
                self.cache.reserve(request.cached, request.cached.length + unread + num_nodes)
        except MemoryError:
            return False
        return True

    def _catch_up(self) -> bool:
        """Read the round that is under way, so that tables may be edited; whether there was one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._take(pending)
        return pending is not None

    def _take(self, pending: Pending) -> None:
        is_ahead = self._pending is not None
        done = self._launched.read(pending, self._batches.launched, is_ahead=is_ahead)
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
                self._places.preempt(request)

    def _shrink(self, error: Exception) -> None:
        """There was no memory for a round of this many: all are taken up again, one fewer."""
        decoding = list(self._batches.requests)
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
            self._places.forget()  # whatever it came of is not to be found again
            at = f" at position {len(request.token_ids)}"
            return request.failed(done.errors.get(row, "logits: NaN or no finite value") + at)
        count, logprobs = outcome.num_taken, done.read.logprobs
        told = done.told[row] if done.told else Told()
        taken = request.append(
            done.read.tokens[row][:count],
            None if logprobs is None else logprobs[row][:count],
            told.top_logprobs,
        )
        has_ended = request.end.reason is not None
        assert has_ended or not outcome.ending, "an end that the text does not have"
        stats.record(outcome.num_nodes, len(taken) - 1, outcome.deepest)
        return request.chunk(taken, outcome.accept_length, told.tree)

    def _fail_all(self) -> None:
        """End all requests: their device is lost."""
        self._pending = None
        for request in list(self.scheduler):
            self._fail(request, f"GPU lost: {self.device.fault}")

    def _fail(self, request: Request, error: str) -> None:
        """End one request alone, and say why."""
        self.end(request, request.failed(error))
