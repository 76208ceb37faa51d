"""A lock on buffers that threads share, in the order of asking."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock, get_ident


class FairLock:
    """A lock for ``with``, handed on in the order of asking, and work that waits until it is free.

    Who leaves and asks again stands behind whoever waits, so that two streams take turns round by
    round.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._door = Lock()  # held by the next in line
        self._owner: int | None = None
        self._waiting: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        """Wait for a turn.

        Raises:
            RuntimeError: this thread is in the middle of one.
        """
        if self._owner == get_ident():
            raise RuntimeError(
                "engine: called from inside its own round (a drafter, a tokenizer or a signal "
                "handler did), where its buffers are in use"
            )
        with self._door:
            self._lock.acquire()
        self._owner = get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()
        self._do_waiting()

    def do_when_free(self, action: Callable[[], None]) -> None:
        """Run ``action`` in a turn: at once if nobody has one, else when it ends.

        Never waits, for the garbage collector may ask, in a thread that has the turn itself.
        """
        self._waiting.append(action)
        self._do_waiting()

    def _do_waiting(self) -> None:
        # Asked again after the release: who came in between could not take the lock.
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    self._waiting.popleft()()
            finally:
                self._lock.release()
