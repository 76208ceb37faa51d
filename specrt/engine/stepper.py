"""The one thread that steps an engine for readers in event loops, and what waits for them."""

from __future__ import annotations

from asyncio import AbstractEventLoop, Future
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Condition, Lock, Thread, current_thread
from typing import TypeVar

from specrt.draft.base import DraftParams
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult, StreamChunk
from specrt.sampling import SamplingParams
from specrt.types import RequestHandle

T = TypeVar("T")
# Of each request: further ones are merged, so that a slow reader costs its text and no more.
_MOST_UNREAD = 16


@dataclass(frozen=True)
class Wanted:
    """One request of a stream."""

    index: int
    """Which prompt it is of."""
    choice: int
    """Which of that prompt's answers."""
    ids: list[int]
    params: SamplingParams
    draft: DraftParams | None


@dataclass(eq=False)
class Inbox:
    """What came of a stream's requests and was not read yet; of one reader, in one loop.

    Written and read under its own lock, for moments.
    """

    loop: AbstractEventLoop
    numbers: dict[RequestHandle, tuple[int, int]] = field(default_factory=dict)
    """Of each of its requests: which prompt it is of, and which of that prompt's answers."""
    chunks: deque[StreamChunk] = field(default_factory=deque)
    waiter: Future[None] | None = None
    """Resolved in the loop when there is something to read."""
    fault: BaseException | None = None
    """Why there will be nothing more."""
    lock: Lock = field(default_factory=Lock)

    def take(self) -> StreamChunk | Future[None]:
        """The oldest chunk; where there is none yet, what is resolved when there is.

        Raises:
            BaseException: what ended the stepping thread.
        """
        with self.lock:
            if self.chunks:
                return self.chunks.popleft()
            if self.fault is not None:
                raise self.fault
            self.waiter = self.loop.create_future()
            return self.waiter

    def put(self, chunk: StreamChunk) -> Future[None] | None:
        """Add a chunk; what is to be resolved, if somebody waits."""
        with self.lock:
            self._put(chunk)
            waiter, self.waiter = self.waiter, None
            return waiter

    def fail(self, fault: BaseException) -> Future[None] | None:
        """Let readers raise what ended the thread; what is to be resolved, as :meth:`put`."""
        with self.lock:
            self.fault = fault
            waiter, self.waiter = self.waiter, None
            return waiter

    def _put(self, chunk: StreamChunk) -> None:
        """To the last chunk of its request, where many wait."""
        index, choice = self.numbers[chunk.handle]
        if index or choice:
            chunk = replace(chunk, index=index, choice=choice, result=_numbered(chunk, choice))
        if len(self.chunks) >= _MOST_UNREAD * len(self.numbers):
            for place in range(len(self.chunks) - 1, -1, -1):
                if self.chunks[place].handle is chunk.handle:
                    self.chunks[place] = _merged(self.chunks[place], chunk)
                    return
        self.chunks.append(chunk)


class Stepper:
    """Steps an engine while any of its requests is open, in a thread of its own.

    The thread alone steps and aborts; it sleeps where there is nothing to do.

    Args:
        engine: whose :meth:`~Engine.step` is called here and nowhere else.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changes = Condition()  # its lock guards what follows
        self._inboxes: dict[RequestHandle, Inbox] = {}
        self._aborts: deque[RequestHandle] = deque()
        self._fault: BaseException | None = None
        self._is_stopped = False
        self._thread: Thread | None = None

    def require(self) -> None:
        """Refuse what would need the thread, if it is gone.

        Raises:
            RuntimeError: so; names why.
        """
        if self._fault is not None:
            fault = f"{type(self._fault).__name__}: {self._fault}"
            raise RuntimeError(f"engine: its stepping thread ended by an error ({fault})")
        if self._is_stopped:
            raise RuntimeError("engine: expected an open AsyncEngine, got one that was closed")

    def add(self, asked: Sequence[Wanted], box: Inbox) -> None:
        """Add requests, all or none.

        Raises:
            ValueError, RuntimeError, QueueFullError: as :meth:`Engine.add`.
        """
        with self._changes:
            self.require()
            if self._thread is None:
                self._thread = Thread(target=self._run, name="specrt-stepper", daemon=True)
                self._thread.start()
            try:
                for one in asked:
                    handle = self._engine.add(one.ids, one.params, one.draft)
                    box.numbers[handle] = one.index, one.choice
                    self._inboxes[handle] = box
            except BaseException:
                self.abort(box)
                raise
            finally:
                self._changes.notify()

    def abort(self, box: Inbox) -> None:
        """End what is open of a stream, before the next round. Nobody hears of it.

        Takes no lock, for the garbage collector may ask in a thread that holds it. While anything
        is open the thread is awake and will look.
        """
        self._aborts.extend(list(box.numbers))

    def stop(self) -> None:
        """End the thread behind the round it is in, and all open streams with it."""
        with self._changes:
            self._is_stopped = True
            self._changes.notify()
        if self._thread is not None and self._thread is not current_thread():
            self._thread.join()

    # --- the thread's own ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                self._hand_out(self._engine.step())
        except BaseException as error:  # of whatever kind: readers must not wait for ever
            self._fault = error
            self._end_all(error)
            return
        self._end_all(RuntimeError("engine: its AsyncEngine was closed"))
        with suppress(Exception):
            self._engine.step()  # the last chunks of what was ended are nobody's

    def _wait(self) -> bool:
        """Sleep until something is to be stepped; False: never again."""
        with self._changes:
            while not (self._inboxes or self._aborts or self._is_stopped):
                self._changes.wait()
        while self._aborts:
            handle = self._aborts.popleft()
            with self._changes:
                self._inboxes.pop(handle, None)
            self._engine.abort(handle)
        return not self._is_stopped

    def _hand_out(self, chunks: Sequence[StreamChunk]) -> None:
        told = []
        with self._changes:
            for chunk in chunks:
                inbox = self._inboxes.get(chunk.handle)
                if inbox is not None:  # or it was aborted
                    told.append((inbox, chunk))
                    if chunk.result is not None:
                        del self._inboxes[chunk.handle]
        self._wake([(inbox, inbox.put(chunk)) for inbox, chunk in told])

    def _wake(self, waiting: Sequence[tuple[Inbox, Future[None] | None]]) -> None:
        """Resolve what readers wait for: one call a loop, however many there are."""
        waiters: dict[AbstractEventLoop, list[Future[None]]] = {}
        for inbox, waiter in waiting:
            if waiter is not None:
                waiters.setdefault(inbox.loop, []).append(waiter)
        for loop, each in waiters.items():
            try:
                loop.call_soon_threadsafe(_resolve, each)
            except RuntimeError:  # the loop was closed: nobody will read
                for inbox, _ in waiting:
                    if inbox.loop is loop:
                        self.abort(inbox)

    def _end_all(self, fault: BaseException) -> None:
        with self._changes:
            handles, inboxes = list(self._inboxes), set(self._inboxes.values())
            self._inboxes.clear()
        self._wake([(inbox, inbox.fail(fault)) for inbox in inboxes])
        with suppress(Exception):  # the engine is closed, or what broke it breaks this too
            for handle in handles:
                self._engine.abort(handle)


def _resolve(waiters: Sequence[Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


def _numbered(chunk: StreamChunk, choice: int) -> GenerationResult | None:
    return None if chunk.result is None else replace(chunk.result, choice=choice)


def _merged(first: StreamChunk, second: StreamChunk) -> StreamChunk:
    """Two chunks of a request as one; of rounds that were merged no tree is known."""
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        num_accepted=first.num_accepted + second.num_accepted,
        logprobs=_joined(first.logprobs, second.logprobs),
        top_logprobs=_joined(first.top_logprobs, second.top_logprobs),
        tree=None,
    )


def _joined(first: list[T] | None, second: list[T] | None) -> list[T] | None:
    return None if first is None or second is None else first + second
