"""Who runs: a queue of requests, those admitted, and who has to give way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from specrt.engine.request import Request
from specrt.types import QueueFullError


class Scheduler:
    """Requests in the order in which they came.

    A request that was preempted waits in front of all others. Whoever was admitted last gives way
    first: so the oldest always goes on, and all come to an end.

    Args:
        max_batch: requests that are admitted at the same time.
        max_waiting: requests that may wait; None: any number.
        has_room: whether there are pages for a request's tokens.
    """

    def __init__(
        self, max_batch: int, max_waiting: int | None, has_room: Callable[[Request], bool]
    ) -> None:
        self.max_batch = max_batch
        self._max_waiting = max_waiting
        self._has_room = has_room
        self._waiting: deque[Request] = deque()
        self._admitted: list[Request] = []  # the oldest first

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is admitted."""
        return not self._waiting and not self._admitted

    @property
    def is_full(self) -> bool:
        """Whether no further request may wait."""
        return self._max_waiting is not None and len(self._waiting) >= self._max_waiting

    @property
    def num_waiting(self) -> int:
        """Requests without a place."""
        return len(self._waiting)

    @property
    def admitted(self) -> list[Request]:
        """Requests with pages, the oldest first."""
        return list(self._admitted)

    def __iter__(self) -> Iterator[Request]:
        """All requests that have not ended."""
        return iter([*self._admitted, *self._waiting])

    def add(self, request: Request) -> None:
        """A request arrives.

        Raises:
            QueueFullError: no further one may wait.
        """
        if self.is_full:
            raise QueueFullError(
                f"max_waiting: expected fewer than {self._max_waiting} waiting requests, got "
                f"{len(self._waiting)}; step the engine, or let some end"
            )
        self._waiting.append(request)

    def admit(self) -> Request | None:
        """The next request whose turn has come, if there is a place and there are pages for it.

        The first in the queue is never overtaken, or large ones would wait for ever. With nobody
        else admitted it is let in whatever room there is: it will end with an error that says what
        was needed.
        """
        if not self._waiting or len(self._admitted) >= self.max_batch:
            return None
        if self._admitted and not self._has_room(self._waiting[0]):
            return None
        request = self._waiting[0]
        self._admitted.append(request)  # first: an interrupt must not come while it is nowhere
        self._waiting.popleft()
        return request

    def preempt(self, request: Request) -> None:
        """An admitted request waits again, before all others."""
        if request not in self._waiting:  # it may be, if admitting it was interrupted
            self._waiting.appendleft(request)
        self._admitted.remove(request)

    def remove(self, request: Request) -> None:
        """A request has ended, wherever it was; one that is gone already stays gone."""
        if request in self._admitted:
            self._admitted.remove(request)
        if request in self._waiting:
            self._waiting.remove(request)
