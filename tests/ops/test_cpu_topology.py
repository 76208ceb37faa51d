"""Which CPUs workers are kept on: made-up machines, written down as the system tells of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from specrt import _C, ops
from specrt.ops.threads import worker_cpus


def write_cpus(
    devices: Path, cores: Iterable[tuple[int, ...]], package: int = 0, *, slow: str = ""
) -> Path:
    """A folder as /sys/devices; each core is given as its CPUs."""
    for core in cores:
        for cpu in core:
            topology = devices / f"system/cpu/cpu{cpu}/topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(",".join(map(str, core)) + "\n")
            (topology / "physical_package_id").write_text(f"{package}\n")
    if slow:
        (devices / "cpu_atom").mkdir()
        (devices / "cpu_atom/cpus").write_text(slow + "\n")
    return devices


def chosen(devices: Path, allowed: Iterable[int], here: int, count: int) -> list[int]:
    cpus = _C.choose_cpus(str(devices), list(allowed), here, count)
    assert not cpus or count <= len(cpus) < len(set(allowed)), "room, and a preference"
    return cpus


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_one_cpu_a_core(tmp_path: Path, pairs: str) -> None:
    step, stride = (8, 1) if pairs == "halves" else (1, 2)
    write_cpus(tmp_path, [(stride * i, stride * i + step) for i in range(8)])
    first = [stride * i for i in range(8)]
    for count in (2, 7, 8):
        assert chosen(tmp_path, range(16), 0, count) == first
    mine = stride * 3 + step  # the caller's own core has no second thread of ours
    expected = sorted([*first[:3], mine, *first[4:]])
    assert chosen(tmp_path, range(16), mine, 4) == expected
    assert chosen(tmp_path, range(16), 0, 9) == []
    assert chosen(tmp_path, range(16), 0, 16) == []


def test_cores_without_siblings_are_all_the_systems(tmp_path: Path) -> None:
    write_cpus(tmp_path, [(i,) for i in range(4)])
    for count in (2, 4, 5):
        assert chosen(tmp_path, range(4), 1, count) == []


def test_the_callers_socket(tmp_path: Path) -> None:
    """Its caches are told too, and make no difference: memory is read through all of them."""
    write_cpus(tmp_path, [(i, i + 32) for i in range(16)], 0)
    write_cpus(tmp_path, [(i, i + 32) for i in range(16, 32)], 1)
    for cpu in range(64):
        cache = tmp_path / f"system/cpu/cpu{cpu}/cache/index3"
        cache.mkdir(parents=True)
        first = cpu % 32 // 4 * 4
        (cache / "shared_cpu_list").write_text(f"{first}-{first + 3},{first + 32}-{first + 35}\n")
    assert chosen(tmp_path, range(64), 3, 4) == list(range(16))
    assert chosen(tmp_path, range(64), 20, 16) == list(range(16, 32))
    assert chosen(tmp_path, range(64), 52, 2) == [*range(16, 20), *range(21, 32), 52]
    assert chosen(tmp_path, range(64), 20, 17) == list(range(32))
    assert chosen(tmp_path, range(64), 20, 33) == []


def test_odd_sets_of_a_container(tmp_path: Path) -> None:
    write_cpus(tmp_path, [(i, i + 8) for i in range(4)], 0)
    write_cpus(tmp_path, [(i, i + 8) for i in range(4, 8)], 1)
    assert chosen(tmp_path, [1, 9, 10, 13], 9, 2) == [9, 10], "10 without its core's first"
    assert chosen(tmp_path, [1, 9, 10, 13], 9, 3) == [9, 10, 13]
    assert chosen(tmp_path, [1, 9, 10, 13], 13, 2) == [1, 10, 13], "one core is not enough"
    assert chosen(tmp_path, [1, 9, 10, 13], 9, 4) == []
    assert chosen(tmp_path, [2, 5, 6], 5, 2) == [5, 6]
    assert chosen(tmp_path, [5], 5, 2) == []
    assert chosen(tmp_path, [1, 9, 10, 13], 0, 2) == [], "the caller is elsewhere"


def test_fast_cores_where_they_suffice(tmp_path: Path) -> None:
    fast, slow = [(2 * i, 2 * i + 1) for i in range(6)], [(i,) for i in range(12, 20)]
    write_cpus(tmp_path, [*fast, *slow], slow="12-17,18,19")
    firsts = [core[0] for core in fast]
    assert chosen(tmp_path, range(20), 0, 6) == firsts
    assert chosen(tmp_path, range(20), 14, 2) == firsts
    assert chosen(tmp_path, range(20), 0, 7) == [*firsts, *range(12, 20)]
    assert chosen(tmp_path, range(20), 0, 15) == []
    assert chosen(tmp_path, range(12, 20), 12, 4) == []


@pytest.mark.parametrize("told", ["thread_siblings_list", "physical_package_id", "topology"])
@pytest.mark.parametrize("text", [None, "", "a riddle"])
def test_what_is_not_told(tmp_path: Path, told: str, text: str | None) -> None:
    write_cpus(tmp_path, [(i, i + 4) for i in range(4)])
    assert chosen(tmp_path, range(8), 0, 2) == [0, 1, 2, 3]
    topology = tmp_path / "system/cpu/cpu6/topology"
    path = topology.parent if told == "topology" else topology / told
    if told == "topology":
        path.rename(tmp_path / "elsewhere")
    elif text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert chosen(tmp_path, range(8), 0, 2) == []


def test_only_workers_are_moved() -> None:
    own, threads = os.sched_getaffinity(0), torch.get_num_threads()
    weight, out = torch.ones(2048, 512), torch.empty(1, 2048)
    before = set(os.listdir("/proc/self/task"))
    try:
        torch.set_num_threads(5)
        ops.linear(weight[:1], weight, out=out)  # makes a pool
        workers = set(os.listdir("/proc/self/task")) - before
        places = [os.sched_getaffinity(int(worker)) for worker in workers]
        assert len(workers) >= 4
        assert all(place in (own, set(worker_cpus())) for place in places)
        assert os.sched_getaffinity(0) == own
    finally:
        torch.set_num_threads(threads)


def test_the_preference_can_be_turned_off() -> None:
    program = "from specrt import _C; print([_C.worker_cpus(n) for n in (1, 2, 3, 64)])"
    environment = {**os.environ, "SPECRT_AFFINITY": "off"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[[], [], [], []]"
