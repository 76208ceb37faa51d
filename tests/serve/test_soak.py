"""A short soak: whatever clients do, nothing is left of them and no text differs."""

from __future__ import annotations

import sys

import pytest

from bench.serve_soak import Sample, Soak, parse, run, verdict
from bench.serving_load import figures
from bench.soak_visits import SHARES, make_visits
from bench.soak_work import make_works
from specrt import builtin

needs_target = pytest.mark.skipif(
    not (builtin.target_path() / "config.json").is_file(), reason="the bundled target is not here"
)
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# Of a short one: memory and the event loop's pool of threads fill by and by.
WARMING = {"memory is flat", "no thread is leaked"}


@needs_target
@needs_proc
def test_forty_requests() -> None:
    args = "--requests 40 --works 14 --short --segment 20 --clients 8 --threads 1 --seed 3"
    report = run(parse(args.split()))
    told = report["verdict"]
    assert report["problems"] == []
    assert [name for name in told if not told[name] and name not in WARMING] == [], report
    assert set(report["counts"]) == set(SHARES)
    assert report["num_compared"] >= 26 and report["num_differing"] == 0
    assert report["server"]["exit"] == 0


@needs_target
def test_the_seed_decides_what_is_done() -> None:
    works = make_works(20, 7)
    assert works == make_works(20, 7) != make_works(20, 8)
    assert make_visits(40, works, ["a"], 1) == make_visits(40, works, ["a"], 1)
    assert {visit.kind for visit in make_visits(40, works, ["a"], 1)} == set(SHARES)


def sample(number: int, **changes: float) -> Sample:
    held = {"resident_kb": 1000, "files": 10, "threads": 5, "running": 0.0, "waiting": 0.0}
    return Sample(**{"num_requests": number, **held, "held": 0.0, "shared": 9.0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, None),
        ({"resident_kb": 1021}, "memory is flat"),
        ({"files": 11}, "no file is leaked"),
        ({"threads": 6}, "no thread is leaked"),
        ({"held": 0.01}, "no page is leaked"),
        ({"running": 1.0}, "all requests end"),
        ({"waiting": 1.0}, "all requests end"),
    ],
)
def test_a_leak_is_seen(changes: dict[str, float], failed: str | None) -> None:
    samples = [*(sample(number) for number in range(6)), *(sample(6, **changes) for _ in range(2))]
    told = verdict(Soak({}, [], 1, 0, samples, 1.0))
    assert [name for name, holds in told.items() if not holds] == ([failed] if failed else [])


@pytest.mark.parametrize(
    ("problem", "num_differing", "failed"),
    [("differs: …", 1, "no text differs"), ("whole: 500", 0, "no other problem")],
)
def test_a_problem_is_seen(problem: str, num_differing: int, failed: str) -> None:
    done = Soak({}, [problem], 1, num_differing, [sample(1), sample(2)], 1.0)
    assert [name for name, holds in verdict(done).items() if not holds] == [failed]


def test_figures_of_an_exposition() -> None:
    text = '# HELP a b\nvllm:a{x="1"} 2.0\nvllm:a{x="2"} 3.5\nb_total 1e+06\nspecrt:c{y="z"} NaN\n'
    assert figures(text) == {"a": 5.5, "b_total": 1e6}
