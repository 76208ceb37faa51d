"""The lock goes by the order of asking, and nobody waits for it who holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from specrt.models.fair_lock import FairLock


def in_thread(body: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def wait_until(holds: Callable[[], bool]) -> None:
    assert any(holds() for _ in range(10**7))


def run_to_its_end(body: Callable[[], None]) -> None:
    """In a thread of its own, so that a deadlock is a failure."""
    thread = in_thread(body)
    thread.join(20)
    assert not thread.is_alive(), "deadlock"


def test_who_comes_back_stands_behind_who_waits() -> None:
    lock, said = FairLock(), list[str]()

    def other() -> None:
        for _ in range(4):
            with lock:
                said.append("b")
                wait_until(lock._door.locked)  # the main thread waits

    with lock:
        thread = in_thread(other)
        wait_until(lock._door.locked)
    for _ in range(4):
        with lock:
            said.append("a")
            if len(said) < 8:
                wait_until(lock._door.locked)
    thread.join()
    assert "".join(said) == "ba" * 4


def test_an_exception_ends_a_turn() -> None:
    lock = FairLock()
    with pytest.raises(KeyError), lock:
        raise KeyError
    with lock:
        pass


def test_a_turn_inside_a_turn_is_an_error_and_no_deadlock() -> None:
    lock = FairLock()

    def nested() -> None:
        with lock, pytest.raises(RuntimeError, match="from inside its own round"), lock:
            pass
        with lock:
            pass

    run_to_its_end(nested)


def test_work_that_waits_until_the_turn_ends() -> None:
    lock, done = FairLock(), list[str]()

    def ask_for_work() -> None:
        lock.do_when_free(lambda: done.append("at once"))
        with lock:
            # As the garbage collector may, in this thread or in another.
            lock.do_when_free(lambda: done.append("own"))
            in_thread(lambda: lock.do_when_free(lambda: done.append("other's"))).join()
            done.append("turn ends")

    run_to_its_end(ask_for_work)
    assert done == ["at once", "turn ends", "own", "other's"]


def test_work_that_fails_leaves_the_turn_and_the_rest_of_the_work() -> None:
    lock, done = FairLock(), list[str]()

    def fail() -> None:
        raise KeyError

    lock.__enter__()
    lock.do_when_free(fail)
    lock.do_when_free(lambda: done.append("rest"))
    with pytest.raises(KeyError):
        lock.__exit__()
    with lock:
        pass
    assert done == ["rest"]
