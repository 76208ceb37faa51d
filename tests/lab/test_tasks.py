"""Prompts by task: names, a choice spread over them, the order they are run in."""

from __future__ import annotations

import pytest

from specrt.lab.tasks import in_turn, spread, task_names

OF_SPEC_BENCH = ["writing"] * 4 + ["stem"] * 4 + ["qa"] * 3 + ["rag"]


def test_mt_bench_is_one_task_of_spec_bench() -> None:
    assert task_names(OF_SPEC_BENCH) == ["mt_bench"] * 8 + ["qa"] * 3 + ["rag"]
    assert task_names(["writing", "stem", None, ""]) == ["writing", "stem", "other", "other"]
    assert task_names([None, ""]) == ["", ""]
    assert task_names([]) == []


@pytest.mark.parametrize(
    ("count", "places"),
    [
        (1, [0]),
        (3, [0, 8, 11]),
        (5, [0, 4, 8, 9, 11]),  # both of MT-Bench's categories
        (7, [0, 2, 5, 8, 9, 10, 11]),
        (12, list(range(12))),
        (99, list(range(12))),
        (None, list(range(12))),
    ],
)
def test_a_choice_is_spread(count: int | None, places: list[int]) -> None:
    assert spread(task_names(OF_SPEC_BENCH), count) == places


def test_without_tasks_the_first_are_taken() -> None:
    assert spread([""] * 5, 2) == [0, 1]
    assert spread(["qa"] * 5, 2) == [0, 1]
    assert spread([], 2) == []


def test_tasks_take_turns() -> None:
    assert in_turn(["a", "a", "a", "b", "c", "c"]) == [0, 3, 4, 1, 5, 2]
    assert in_turn(["", ""]) == [0, 1]
