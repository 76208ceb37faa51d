"""Who runs and who waits: the scheduler alone, whose requests are mere names here."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from specrt.engine.scheduler import Scheduler
from specrt.types import QueueFullError


def make_scheduler(
    max_batch: int = 2,
    max_waiting: int | None = None,
    has_room: Callable[[Any], bool] = lambda _: True,
) -> Any:
    """One that takes anything for a request: it looks into none."""
    return Scheduler(max_batch, max_waiting, has_room)


def admit_all(scheduler: Any) -> list[str]:
    admitted = []
    while (request := scheduler.admit()) is not None:
        admitted.append(request)
    return admitted


def test_requests_are_admitted_in_the_order_in_which_they_came() -> None:
    scheduler = make_scheduler(max_batch=2)
    assert scheduler.is_idle and scheduler.admit() is None
    for name in "abcd":
        scheduler.add(name)
    assert not scheduler.is_idle
    assert admit_all(scheduler) == ["a", "b"] == scheduler.admitted
    assert list(scheduler) == list("abcd")
    scheduler.remove("a")
    assert admit_all(scheduler) == ["c"]
    assert scheduler.admitted == ["b", "c"]


def test_who_was_preempted_waits_before_all_others() -> None:
    scheduler = make_scheduler(max_batch=3)
    for name in "abcde":
        scheduler.add(name)
    admit_all(scheduler)
    for name in "cb":  # who came last gives way first
        scheduler.preempt(name)
    assert scheduler.admitted == ["a"]
    assert admit_all(scheduler) == ["b", "c"]
    assert list(scheduler) == list("abcde")


def test_nobody_overtakes_a_request_that_there_is_no_room_for() -> None:
    rooms = {"large": False}
    scheduler = make_scheduler(max_batch=4, has_room=lambda name: rooms.get(name, True))
    for name in ("first", "large", "small"):
        scheduler.add(name)
    assert admit_all(scheduler) == ["first"]
    rooms["large"] = True
    assert admit_all(scheduler) == ["large", "small"]


def test_who_is_alone_is_admitted_whatever_room_there_is() -> None:
    """It is to hear that it needs too much, and would wait for ever."""
    scheduler = make_scheduler(max_batch=4, has_room=lambda _: False)
    scheduler.add("a")
    scheduler.add("b")
    assert admit_all(scheduler) == ["a"]
    scheduler.remove("a")
    assert admit_all(scheduler) == ["b"]


def test_a_full_queue_refuses_and_loses_nothing() -> None:
    scheduler = make_scheduler(max_batch=1, max_waiting=2)
    for name in "ab":
        assert not scheduler.is_full
        scheduler.add(name)
    assert scheduler.is_full
    expected = r"^max_waiting: expected fewer than 2 waiting requests, got 2; .*$"
    with pytest.raises(QueueFullError, match=expected):
        scheduler.add("c")
    assert list(scheduler) == ["a", "b"]
    scheduler.admit()
    scheduler.add("c")
    # Who gives way was let in before: it needs no place in the queue.
    scheduler.preempt("a")
    assert list(scheduler) == ["a", "b", "c"] and scheduler.is_full


def test_a_request_leaves_from_wherever_it_is() -> None:
    scheduler = make_scheduler(max_batch=1)
    for name in "abc":
        scheduler.add(name)
    scheduler.admit()
    for name in ("b", "a", "gone", "b"):
        scheduler.remove(name)
    assert list(scheduler) == ["c"] and scheduler.admitted == []
    scheduler.remove("c")
    assert scheduler.is_idle


@pytest.mark.parametrize("seed", range(20))
def test_the_oldest_is_always_the_next(seed: int) -> None:
    """Whatever happens, what is admitted and what waits stand in the order of coming."""
    rng = random.Random(seed)
    scheduler = make_scheduler(max_batch=3, has_room=lambda _: rng.random() < 0.7)
    for number in range(300):
        actions: list[Callable[[], object]] = [
            lambda: scheduler.add(number),  # noqa: B023 (called at once)
            scheduler.admit,
            lambda: scheduler.admitted and scheduler.preempt(scheduler.admitted[-1]),
            lambda: scheduler.remove(rng.choice(list(scheduler) or [0])),
        ]
        rng.choice(actions)()
        everyone = list(scheduler)
        assert everyone == sorted(everyone)
        assert len(scheduler.admitted) <= 3
