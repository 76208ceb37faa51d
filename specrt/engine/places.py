"""Who has pages: whether a request fits, and who gives way where they run out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from specrt.cache import KVCache
from specrt.engine.batches import Batches
from specrt.engine.drafting import Drafting
from specrt.engine.fault import DeviceWatch
from specrt.engine.limits import EngineLimits
from specrt.engine.request import Request
from specrt.engine.scheduler import Scheduler


class Places:
    """What each request of an engine holds: pages, a row of a batch, the drafter's part.

    Args:
        cache: the target's.
        limits: how much at once.
        batches: of those that decode.
        drafting: whose drafter holds something for each.
        device: whether it still answers.
        catch_up: reads the round that is under way; whether there was one.
        fail: ends a request, and says why.
    """

    def __init__(
        self,
        cache: KVCache,
        limits: EngineLimits,
        batches: Batches,
        drafting: Drafting,
        device: DeviceWatch,
        catch_up: Callable[[], bool],
        fail: Callable[[Request, str], None],
    ) -> None:
        self.cache = cache
        self._limits = limits
        self._batches = batches
        self._drafting = drafting
        self._device = device
        self._catch_up = catch_up
        self._fail = fail
        self.scheduler = Scheduler(limits.max_batch, limits.max_waiting, self.has_room)

    def has_room(self, request: Request) -> bool:
        """Whether there are pages for a request that waits."""
        limits, num_tokens = self._limits, len(request.token_ids)
        num_rows = max(limits.prefill_chunk, limits.max_nodes)
        return self.cache.can_hold(num_tokens + limits.max_nodes, num_rows)

    def reserve(self, request: Request, num_tokens: int) -> bool:
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
        if self._catch_up():  # and pages may be free now
            return not request.is_over
        admitted = self.scheduler.admitted
        if len(admitted) == 1:
            self._fail(request, str(error))
            return False
        self.preempt(admitted[-1])
        return admitted[-1] is not request

    def preempt(self, request: Request) -> None:
        """All it keeps is its tokens: the noise is a counter, so they are what they would be."""
        self.release(request)
        self.scheduler.preempt(request)

    def release(self, request: Request) -> None:
        """Free what it holds. No round of its is under way."""
        with ExitStack() as releases:
            releases.callback(self._close, request)
            releases.callback(self._drafting.finish, request)
            if self._device.fault is None:  # or nothing can be written to the batches' tables
                self._batches.leave(request)
            self._drafting.regroup()

    def _close(self, request: Request) -> None:
        if request.cached is not None:
            self.cache.close(request.cached)
            request.cached = None
