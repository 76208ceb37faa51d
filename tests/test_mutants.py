"""Broken checkpoints end in a CheckpointError or run; nothing else, and in time."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mutants import fault, make_bases, make_mutant

NUM_MUTANTS = 6000
NUM_QUICK = 24
DEADLINE = 120.0  # seconds for one mutant, on however busy a machine


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mutants")
    make_bases(path)
    return path


@pytest.mark.filterwarnings("ignore")  # torch's, of what the mutants have in them
@pytest.mark.parametrize("seed", range(NUM_QUICK))
def test_a_few_mutants(seed: int, work: Path) -> None:
    mutant = make_mutant(work, seed)
    assert fault(work, mutant) is None, mutant.change


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, object] | None]:
    """What a child prints; None when it has been silent for too long."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=DEADLINE)
        except queue.Empty:
            yield None
            return
        if not line:
            return
        yield json.loads(line)


def _faults(work: Path, first: int, last: int) -> list[str]:
    """Of the mutants of a range of seeds, each in a child that may be killed for the next."""
    found = []
    while first < last:
        command = [sys.executable, "-m", "tests.mutants", work, str(first), str(last)]
        started = {"seed": first, "change": "before the first"}
        is_open = True
        with subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            for said in _lines(process):
                if said is None:
                    process.kill()
                    found.append(f"hangs: {started}")
                    break
                is_open = "change" in said
                if is_open:
                    started = said
                elif said["fault"] is not None:
                    found.append(f"{started}: {said['fault']}")
            else:
                if process.wait() or is_open:
                    found.append(f"dies with {process.returncode}: {started}")
        first = int(str(started["seed"])) + 1
    return found


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_mutants(tmp_path: Path) -> None:
    num_workers = len(os.sched_getaffinity(0))
    bounds = [NUM_MUTANTS * worker // num_workers for worker in range(num_workers + 1)]
    works = [tmp_path / str(worker) for worker in range(num_workers)]
    for work in works:
        make_bases(work)
    with ThreadPoolExecutor(num_workers) as pool:
        found = pool.map(_faults, works, bounds, bounds[1:])
    assert [line for lines in found for line in lines] == []
