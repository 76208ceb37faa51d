"""Broken checkpoints end in a CheckpointError or run; nothing else, and in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mutants import fault, make_bases, make_mutant

NUM_MUTANTS = 6000
NUM_QUICK = 24
DEADLINE = 600.0
"""Seconds for one mutant, on however busy a machine; the first waits for imports too."""


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


def _faults(work: Path, first: int, last: int) -> list[str]:
    """Of the mutants of a range of seeds, each in a child that may be killed for the next."""
    found: list[str] = []
    while first < last:
        command = [sys.executable, "-m", "tests.mutants", str(work), str(first), str(last)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            seed, change = _follow(process, found)
        if process.returncode == 0:
            break
        found.append(f"{seed}: ends the process with {process.returncode}: {change}")
        if seed < first:  # not even one was made
            break
        first = seed + 1
    return found


def _follow(process: subprocess.Popen[str], found: list[str]) -> tuple[int, str]:
    """Hear a child out, and kill it where it is silent for too long; its last mutant."""
    assert process.stdout is not None
    seed, change = -1, "none"
    watchdog = threading.Timer(DEADLINE, process.kill)
    watchdog.start()
    for line in process.stdout:
        watchdog.cancel()
        watchdog = threading.Timer(DEADLINE, process.kill)
        watchdog.start()
        said = json.loads(line)
        seed, change = said["seed"], said.get("change", change)
        if said.get("fault") is not None:
            found.append(f"{seed}: {change}: {said['fault']}")
    watchdog.cancel()
    return seed, change


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
