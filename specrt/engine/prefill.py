"""Prompts of those that were admitted, run in pieces between the rounds of those that decode."""

from __future__ import annotations

from collections.abc import Callable

from specrt.cache import CacheBatch
from specrt.engine.batches import Batches
from specrt.engine.drafting import Drafting
from specrt.engine.fault import DeviceWatch
from specrt.engine.limits import EngineLimits
from specrt.engine.pace import Pace
from specrt.engine.places import Places
from specrt.engine.reports import Reports
from specrt.engine.request import Request
from specrt.models.model import LlamaModel


class Prefill:
    """Admits requests and runs their prompts; those that are through join a batch.

    Args:
        target: runs them.
        limits: how much at once.
        places: who has pages, and the queue.
        reports: told of prompts whose log-probabilities are wanted.
        batches: of those that decode.
        drafting: whose drafter is told.
        device: whether it still answers.
        catch_up: reads the round that is under way.
        fail: ends a request, and says why.
    """

    def __init__(
        self,
        target: LlamaModel,
        limits: EngineLimits,
        places: Places,
        reports: Reports,
        batches: Batches,
        drafting: Drafting,
        device: DeviceWatch,
        catch_up: Callable[[], bool],
        fail: Callable[[Request, str], None],
    ) -> None:
        self._target = target
        self.pace = Pace(limits.prefill_chunk)
        """Told here what prompts took, elsewhere what rounds did; on a CPU."""
        self._places = places
        self._reports = reports
        self._batches = batches
        self._drafting = drafting
        self._device = device
        self._catch_up = catch_up
        self._fail = fail

    def run(self) -> None:
        """Run at most a chunk of prompts; those that are through join a batch."""
        # What prompts take on a GPU is known too late, and is little.
        is_waited_for = not self._target.device.is_gpu and len(self._batches.requests) > 0
        left = self.pace.chunk(is_waited_for=is_waited_for)
        while left > 0:
            request = self._next()
            if request is None:
                return
            num_tokens = self._run_piece(request, left)
            left -= self.pace.price(num_tokens, is_waited_for=is_waited_for)

    def _next(self) -> Request | None:
        decoding, scheduler = self._batches.requests, self._places.scheduler
        for request in scheduler.admitted:
            if request not in decoding:
                return request
        admitted = scheduler.admit()
        if admitted is not None:
            admitted.cached = self._places.cache.open()
            self._drafting.start(admitted)
        return admitted

    def _run_piece(self, request: Request, most: int) -> int:
        """Run up to ``most`` tokens of a prompt; how many there were."""
        # Not before: what is kept by now may be what was run a moment ago.
        if not self._places.begin(request):
            return 0
        count = min(most, request.num_to_prefill)
        held = request.cached
        assert held is not None, "an admitted request has a place for pages"
        if not self._places.reserve(request, held.length + count):
            return 0
        device, first = self._target.device, held.length
        started = device.mark()
        try:
            self._extend(request, first, first + count)
        except Exception as error:
            if self._device.is_lost(error):
                raise
            self._fail(request, f"{type(error).__name__}: {error}")
            return count
        ended = device.mark()
        request.prefills.append((started, ended))
        if not device.is_gpu:
            self.pace.observe_prompt(count, device.ms_between(started, ended))
        if request.num_to_prefill == 0:
            self._catch_up()
            self._batches.join(request)
            self._drafting.regroup()
        return count

    def _extend(self, request: Request, first: int, end: int) -> None:
        assert request.cached is not None, "an admitted request has a place for pages"
        batch = CacheBatch(self._places.cache, [request.cached])
        ids, drafters = request.token_ids[first:end], self._drafting.taps([request])
        taps = self._reports.prompt_taps(request, drafters)
        for start, piece in self._target.extend(ids, batch, taps=taps):
            self._reports.take_prompt(request, first + start, piece)
            own = {tap: states for tap, states in piece.items() if tap in drafters}
            self._drafting.prefill(request, first + start, own)
        self._places.keep(request)
        self._places.cache.release(request.cached)  # a chunk's pages are many
