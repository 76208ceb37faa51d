"""A lock on buffers that threads share, in the order of asking."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from threading import Lock, RLock, get_ident
from typing import TypeVar

T = TypeVar("T")


class FairLock:
    """A lock, handed on in the order of asking, and work that waits until it is free.

    Who leaves and asks again stands behind whoever waits, so that two streams take turns round by
    round. Ctrl-C frees it wherever it comes.
    """

    def __init__(self) -> None:
        self._lock = RLock()  # for who alone may release it: its owner, as the lock itself knows
        self._door = Lock()  # held by the next in line
        self._owner: int | None = None
        self._waiting: deque[Callable[[], None]] = deque()

    def run(self, action: Callable[[], T]) -> T:
        """Wait for the lock and run ``action`` with it held.

        Raises:
            RuntimeError: this thread holds it already.
        """
        if self._owner == get_ident():
            raise RuntimeError(
                "engine: called from inside its own round (a drafter, a tokenizer or a signal "
                "handler did), where its buffers are in use"
            )
        results: list[T] = []
        try:
            self._hold(self._stand_in_line, lambda: results.append(action()))
        finally:
            self._do_waiting()
        return results[0]

    def do_when_free(self, action: Callable[[], None]) -> None:
        """Run ``action`` with the lock held: at once if it is free, else when it will be.

        Never waits, for the garbage collector may ask, in a thread that holds it itself.
        """
        self._waiting.append(action)
        self._do_waiting()

    def _stand_in_line(self) -> bool:
        with self._door:
            return self._lock.acquire()

    def _do_waiting(self) -> None:
        acquire = partial(self._lock.acquire, blocking=False)
        # Asked again after the release: who came in between could not take the lock.
        while self._waiting and self._owner != get_ident():
            if not self._hold(acquire, self._do_all_waiting):
                return

    def _do_all_waiting(self) -> None:
        while self._waiting:
            self._waiting.popleft()()

    def _hold(self, acquire: Callable[[], bool], action: Callable[[], object]) -> bool:
        """Run ``action`` with the lock held, if ``acquire`` gets it; whether it did."""
        me = get_ident()
        try:
            if not acquire():
                return False
            self._owner = me
            action()
            return True
        finally:
            # Python may raise KeyboardInterrupt behind any call, that of acquire too. So the first
            # one here releases, whatever has come before.
            if self._owner == me:
                self._owner = None
            try:  # noqa: SIM105 (suppress() is a call)
                self._lock.release()
            except RuntimeError:  # this thread did not have it
                pass
