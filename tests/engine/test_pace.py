"""``Pace``: prompts take no more than a few rounds' time from those that decode."""

from __future__ import annotations

import pytest

from specrt.engine.pace import Pace


def measured(most: int, row_ms: float, round_ms: float) -> Pace:
    pace = Pace(most)
    pace.observe_prompt(100, 100 * row_ms)
    pace.observe_round(round_ms)
    return pace


def test_nobody_waits() -> None:
    assert measured(512, 1.0, 10.0).chunk(is_waited_for=False) == 512


def test_before_anything_was_measured() -> None:
    pace = Pace(512)
    assert pace.chunk(is_waited_for=True) == 128
    pace.observe_round(10.0)
    assert pace.chunk(is_waited_for=True) == 128
    assert Pace(16).chunk(is_waited_for=True) == 16


@pytest.mark.parametrize(
    ("row_ms", "round_ms", "tokens"),
    [(1.0, 40.0, 60), (0.5, 40.0, 120), (1.0, 4.0, 32), (0.01, 40.0, 512), (0.0, 40.0, 512)],
)
def test_one_and_a_half_rounds_time(row_ms: float, round_ms: float, tokens: int) -> None:
    assert measured(512, row_ms, round_ms).chunk(is_waited_for=True) == tokens


def test_a_limit_is_kept() -> None:
    assert measured(20, 1.0, 4.0).chunk(is_waited_for=True) == 20


def test_short_pieces_tell_nothing() -> None:
    pace = measured(512, 1.0, 40.0)
    pace.observe_prompt(1, 50.0)
    assert pace.chunk(is_waited_for=True) == 60


def test_one_slow_round_does_not_open_the_gate() -> None:
    pace = measured(512, 1.0, 40.0)
    pace.observe_round(60_000.0)
    assert pace.chunk(is_waited_for=True) == 78  # 0.9 * 40 + 0.1 * 160 ms, one and a half times
    for _ in range(60):
        pace.observe_round(30.0)
    assert pace.chunk(is_waited_for=True) == 45


def test_a_short_piece_counts_as_the_pass_that_it_is() -> None:
    pace = measured(512, 1.0, 40.0)
    assert [pace.price(n, is_waited_for=True) for n in (0, 1, 8, 32, 100)] == [32, 32, 32, 32, 100]
    assert [pace.price(n, is_waited_for=False) for n in (0, 1, 8, 100)] == [1, 1, 8, 100]
