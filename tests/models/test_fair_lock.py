"""Turns go by the order of asking, and nobody waits for one in the middle of one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial

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


def nothing() -> None: ...


def test_who_comes_back_stands_behind_who_waits() -> None:
    lock, said = FairLock(), list[str]()

    def say(letter: str) -> None:
        said.append(letter)
        if len(said) < 8:
            wait_until(lock._door.locked)  # the other one waits

    def other() -> None:
        for _ in range(4):
            lock.run(lambda: say("b"))

    def begin() -> threading.Thread:
        thread = in_thread(other)
        wait_until(lock._door.locked)
        return thread

    thread = lock.run(begin)
    for _ in range(4):
        lock.run(lambda: say("a"))
    thread.join()
    assert "".join(said) == "ba" * 4


def test_an_exception_ends_a_turn() -> None:
    lock = FairLock()

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        lock.run(fail)
    run_to_its_end(lambda: lock.run(nothing))


def test_a_turn_inside_a_turn_is_an_error_and_no_deadlock() -> None:
    lock = FairLock()

    def nested() -> None:
        with pytest.raises(RuntimeError, match="from inside its own round"):
            lock.run(lambda: lock.run(nothing))
        lock.run(nothing)

    run_to_its_end(nested)
    run_to_its_end(nested)


def test_work_that_waits_until_the_turn_ends() -> None:
    lock, done = FairLock(), list[str]()

    def ask() -> None:
        # As the garbage collector may, in this thread or in another.
        lock.do_when_free(lambda: done.append("own"))
        in_thread(lambda: lock.do_when_free(lambda: done.append("other's"))).join()
        done.append("turn ends")

    def ask_for_work() -> None:
        lock.do_when_free(lambda: done.append("at once"))
        lock.run(ask)

    run_to_its_end(ask_for_work)
    assert done == ["at once", "turn ends", "own", "other's"]


def test_work_that_fails_leaves_the_turn_and_the_rest_of_the_work() -> None:
    lock, done = FairLock(), list[str]()

    def fail() -> None:
        raise KeyError

    def ask() -> None:
        lock.do_when_free(fail)
        lock.do_when_free(lambda: done.append("rest"))

    with pytest.raises(KeyError):
        lock.run(ask)
    run_to_its_end(lambda: lock.run(nothing))
    assert done == ["rest"]


def test_an_interrupt_behind_any_call_ends_the_turn() -> None:
    """Python raises KeyboardInterrupt where a function begins and where a call has returned."""
    lock, done = FairLock(), list[int]()

    def turn(number: int) -> None:
        lock.do_when_free(lambda: done.append(number))

    is_interrupted, number = True, 0
    while is_interrupted:
        left = number

        def interrupt(frame: object, event: str, argument: object) -> None:
            nonlocal left
            left -= event in ("call", "c_return")
            if left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            lock.run(partial(turn, number))
            is_interrupted = False
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        run_to_its_end(lambda: lock.run(nothing))
        assert lock._owner is None
        number += 1
    assert number > 15
    assert done[-1] == number - 1
