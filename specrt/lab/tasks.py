"""Prompts by task: what benchmarks call theirs, and a choice that is spread over them."""

from __future__ import annotations

from collections.abc import Sequence

MT_BENCH = "mt_bench"
OTHER = "other"
# Spec-Bench (arXiv 2401.07851) names the five tasks it adds to MT-Bench, and leaves MT-Bench's
# questions, its sixth task, in the eight categories of their own.
_SPEC_BENCH = {"translation", "summarization", "qa", "math_reasoning", "rag"}
_MT_BENCH = {
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
}  # fmt: skip


def task_names(categories: Sequence[str | None]) -> list[str]:
    """The task of each prompt of a file.

    MT-Bench's categories are one task, ``"mt_bench"``, where Spec-Bench's others are there too.

    Args:
        categories: what each prompt's line says its task or category is; None: nothing.

    Returns:
        Names, ``"other"`` of those without; all are ``""`` if no line says anything.
    """
    if not any(categories):
        return [""] * len(categories)
    is_spec_bench = not _SPEC_BENCH.isdisjoint(categories)
    return [
        MT_BENCH if is_spec_bench and category in _MT_BENCH else category or OTHER
        for category in categories
    ]


def spread(tasks: Sequence[str], count: int | None) -> list[int]:
    """Which prompts to take: as many of each task as of any other, evenly spaced in it.

    Args:
        tasks: of all prompts, as :func:`task_names` gives them.
        count: how many to take; None, or more than there are: all. Without tasks they are the
            first ones.

    Returns:
        Places of the prompts, rising.
    """
    places = by_task(tasks)
    if count is None or len(places) == 1:
        return list(range(len(tasks)))[:count]
    shares, left = dict.fromkeys(places, 0), min(count, len(tasks))
    while left:
        for task, found in places.items():
            if left and shares[task] < len(found):
                shares[task] += 1
                left -= 1
    return sorted(
        places[task][i * len(places[task]) // share]
        for task, share in shares.items()
        for i in range(share)
    )


def in_turn(tasks: Sequence[str]) -> list[int]:
    """All places, each task's first prompt before any task's second."""
    ranks = {place: rank for found in by_task(tasks).values() for rank, place in enumerate(found)}
    return sorted(ranks, key=lambda place: (ranks[place], place))


def by_task(tasks: Sequence[str]) -> dict[str, list[int]]:
    """Places of each task's prompts; tasks as they first come."""
    places: dict[str, list[int]] = {}
    for place, task in enumerate(tasks):
        places.setdefault(task, []).append(place)
    return places
