"""Threads and streams that share an engine: who finds nothing in its box steps it for all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import partial

from specrt.engine.core import EngineCore
from specrt.engine.intake import Asked
from specrt.engine.request import Request
from specrt.engine.results import StreamChunk
from specrt.models.fair_lock import FairLock
from specrt.types import QueueFullError, RequestHandle


class Turns:
    """Steps an engine's core, a thread at a time.

    Args:
        core: what is stepped.
        lock: who has it may.
        enqueue: makes a request of what is asked, whose chunks go into a box; raises QueueFullError
            as :meth:`specrt.engine.engine.Engine.add`.
        check_open: raises RuntimeError if the engine is closed.
    """

    def __init__(
        self,
        core: EngineCore,
        lock: FairLock,
        enqueue: Callable[[Asked, bool, deque[StreamChunk]], Request],
        check_open: Callable[[], None],
    ) -> None:
        self._core: EngineCore | None = core
        self._lock = lock
        self._enqueue = enqueue
        self._check_open = check_open

    def close(self) -> None:
        """Let go of the core."""
        self._core = None

    def step(self, box: deque[StreamChunk]) -> None:
        """Step, unless what is wanted has come into ``box`` by another thread's step."""
        self._lock.run(partial(self._step, box))

    def answers(self, asked: deque[Asked], is_streamed: bool) -> Generator[StreamChunk, None, None]:
        """What comes of some requests, while this thread or another steps the engine."""
        box, mine = deque[StreamChunk](), dict[RequestHandle, Request]()
        try:
            while asked or mine:
                self._feed(asked, is_streamed, box, mine)
                self._lock.run(partial(self._step, box))
                while box:
                    chunk = box.popleft()
                    if chunk.result is not None:
                        del mine[chunk.handle]
                    yield chunk
        finally:
            # Maybe by the garbage collector in the middle of another stream's round.
            self._lock.do_when_free(partial(self._drop, mine))

    def _feed(
        self,
        asked: deque[Asked],
        is_streamed: bool,
        box: deque[StreamChunk],
        mine: dict[RequestHandle, Request],
    ) -> None:
        """Add what the queue has room for."""
        self._check_open()
        while asked:
            try:
                request = self._enqueue(asked[0], is_streamed, box)
            except QueueFullError:
                return
            mine[request.handle] = request
            asked.popleft()

    def _step(self, box: deque[StreamChunk]) -> None:
        if not box:
            self._check_open()
            core = self._core
            assert core is not None, "it is open"
            core.step()

    def _drop(self, requests: dict[RequestHandle, Request]) -> None:
        """Free what a stream's requests hold, whichever way it ended; nobody hears of it."""
        core = self._core
        if core is None:
            return
        with ExitStack() as releases:  # all of them, though one may raise
            # The last one registered is the first done: the oldest, which the queue finds at once.
            for request in reversed(requests.values()):
                releases.callback(core.remove, request)
