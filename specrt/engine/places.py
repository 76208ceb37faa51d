"""Who has pages: whether a request fits, and who gives way where they run out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from specrt.cache import CachedSequence, KVCache
from specrt.engine.batches import Batches
from specrt.engine.drafting import Drafting
from specrt.engine.fault import DeviceWatch
from specrt.engine.limits import EngineLimits
from specrt.engine.memory import share_beginnings
from specrt.engine.request import Request
from specrt.engine.scheduler import Scheduler


class Places:
    """What each request of an engine holds: pages, a row of a batch, the drafter's part.

    Args:
        cache: the target's.
        drafts: the drafter's, if it shares beginnings too.
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
        drafts: KVCache | None,
        limits: EngineLimits,
        batches: Batches,
        drafting: Drafting,
        device: DeviceWatch,
        catch_up: Callable[[], bool],
        fail: Callable[[Request, str], None],
    ) -> None:
        self.cache = cache
        self._caches = [cache] if drafts is None else [cache, drafts]
        for one in self._caches:
            share_beginnings(one, limits)
        self.num_looked_up = self.num_found = 0
        """Tokens of prompts, and of these those that were kept."""
        self._limits = limits
        self._batches = batches
        self._drafting = drafting
        self._device = device
        self._catch_up = catch_up
        self._fail = fail
        self.scheduler = Scheduler(limits.max_batch, limits.max_waiting, self.has_room)

    def close(self) -> None:
        """Let go of everything."""
        self.forget()  # the drafter may be others' too
        del self.scheduler  # whose `has_room` this is

    def has_room(self, request: Request) -> bool:
        """Whether there are pages for a request that waits."""
        limits, ids = self._limits, request.token_ids
        sizes = len(ids) + limits.max_nodes, max(limits.prefill_chunk, limits.max_nodes)
        if self.cache.can_hold(*sizes):
            return True
        _, num_held = self.cache.find(request.params.cache_salt, ids, len(ids) - 1)
        return self.cache.can_hold(*sizes, num_held)

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Pages for an admitted request; False if it had to give way, or to end, itself.

        Whoever came last gives way, by giving up its pages and being computed again later.
        """
        return self._with_room(request, lambda cached: self.cache.reserve(cached, num_tokens))

    def begin(self, request: Request) -> bool:
        """What is kept of the tokens that an admitted request begins with, if it has nothing yet;
        False as for :meth:`reserve`."""
        return self._with_room(request, partial(self._take_up, request))

    def keep(self, request: Request) -> None:
        """Keep what its prompt's pages hold for others that begin alike."""
        if request.cached is not None:
            self.cache.keep(request.cached, request.params.cache_salt, request.token_ids)

    def forget(self) -> None:
        """Keep nothing of what was kept so far."""
        for cache in self._caches:
            cache.forget()

    def _with_room(self, request: Request, take: Callable[[CachedSequence], None]) -> bool:
        while request.cached is not None:
            try:
                take(request.cached)
                return True
            except MemoryError as error:
                if not self._make_way(request, error):
                    return False
        return False

    def _take_up(self, request: Request, cached: CachedSequence) -> None:
        """As much as the target and the drafter both have; the last token is run in any case."""
        ids, salt, most = request.token_ids, request.params.cache_salt, request.num_to_prefill
        if cached.length or most <= 0 or self._limits.max_shared_tokens == 0:
            return
        if request.params.prompt_logprobs is not None:  # every token is to be run and told of
            return
        count, _ = self.cache.find(salt, ids, most)
        while count and (known := self._drafting.num_known(request, count)) < count:
            count, _ = self.cache.find(salt, ids, known)
        self.cache.take_up(cached, salt, ids, count)
        if count:
            self._drafting.begin_at(request, count)
        if not request.is_looked_up:
            request.is_looked_up = True
            request.stats.num_cached_tokens = count
            self.num_looked_up += most
            self.num_found += count

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

    def preempt(self, request: Request, *, is_sound: bool = True) -> None:
        """All it keeps is its tokens: the noise is a counter, so they are what they would be. What
        it has computed is found again, if nobody needs the pages."""
        self.release(request, is_sound=is_sound)
        self.scheduler.preempt(request)

    def release(self, request: Request, *, is_sound: bool = True) -> None:
        """Let go of what it holds. No round of its is under way.

        Args:
            request: whose.
            is_sound: whether its rows may be kept for others.
        """
        with ExitStack() as releases:
            releases.callback(self._close, request, is_sound)
            releases.callback(self._drafting.finish, request)
            if self._device.fault is None:  # or nothing can be written to the batches' tables
                self._batches.leave(request)
            self._drafting.regroup()

    def _close(self, request: Request, is_sound: bool) -> None:
        cached = request.cached
        if cached is not None:
            if is_sound and request.error is None:
                salt, ids = request.params.cache_salt, request.token_ids
                self.cache.keep(cached, salt, ids, is_over=True)
            self.cache.close(cached)
            request.cached = None
