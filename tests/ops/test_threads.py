"""The kernels' threads: who runs what cannot show in a bit, and nobody waits for who has not begun.

By counts of pieces, never by time: workers are held by a rest that outlasts the test.
"""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from specrt import _C, ops
from specrt.ops import threads
from specrt.ops.graph import CpuGraph
from specrt.ops.threads import cpu_quota, respect_quota, threads_within

ROOT = Path(__file__).parents[2]
COUNTS = (1, 2, 3, 8)
HIDDEN, INNER, ROWS = 256, 704, 5


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    _C.rest_workers(0)
    torch.set_num_threads(before)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


class Chain:
    """Launches that depend on one another, two of them in place: nothing may run twice or early."""

    def __init__(self) -> None:
        self._first = random(2 * INNER, HIDDEN, seed=1)
        self._second = random(HIDDEN, INNER, seed=2)
        self._norm = random(HIDDEN, seed=3)
        self._start = random(ROWS, HIDDEN, seed=4)
        self._x, self._normed = self._start.clone(), torch.empty(ROWS, HIDDEN)
        self._gate_up, self._gated = torch.empty(ROWS, 2 * INNER), torch.empty(ROWS, INNER)
        self._run = CpuGraph.capture(self._launch).launch

    def _launch(self) -> None:
        for _ in range(12):
            ops.rms_norm(self._x, self._norm, 1e-6, out=self._normed)
            ops.linear(self._normed, self._first, out=self._gate_up)
            ops.activate(self._gate_up, self._gated)
            ops.linear(self._gated, self._second, residual=self._x, out=self._x)

    def run(self) -> torch.Tensor:
        self._x.copy_(self._start)
        self._run()
        return self._x.clone()


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain()


@pytest.fixture(scope="module")
def expected(chain: Chain) -> torch.Tensor:
    torch.set_num_threads(1)
    return chain.run()


def pieces_of(run: Callable[[], object]) -> list[int]:
    """By each of the pool's threads."""
    before = _C.pieces_by_thread()
    run()
    return [after - count for after, count in zip(_C.pieces_by_thread(), before, strict=True)]


@pytest.mark.parametrize("count", COUNTS[1:])
def test_the_caller_alone_ends_what_no_worker_begins(
    chain: Chain, expected: torch.Tensor, count: int
) -> None:
    torch.set_num_threads(count)
    chain.run()  # makes the pool
    for _ in range(20):  # workers are met idle and asleep, between two launches and in one
        _C.rest_workers(0)
        shared = pieces_of(chain.run)
        _C.rest_workers(1000)
        outputs: list[torch.Tensor] = []
        alone = pieces_of(lambda: outputs.append(chain.run()))  # noqa: B023
        assert torch.equal(outputs[0], expected)
        assert alone[1:] == [0] * (count - 1)
        assert alone[0] == sum(shared), "pieces depend on who does them"


def test_workers_take_part(chain: Chain, expected: torch.Tensor) -> None:
    torch.set_num_threads(2)
    chain.run()
    end, by_thread = time.monotonic() + 60, [0, 0]
    while by_thread[1] == 0 and time.monotonic() < end:
        by_thread = pieces_of(lambda: chain.run())
    assert by_thread[1] > 0


@pytest.mark.parametrize("count", COUNTS)
def test_threads_change_no_bit(chain: Chain, expected: torch.Tensor, count: int) -> None:
    torch.set_num_threads(count)
    for _ in range(30):
        assert torch.equal(chain.run(), expected)


def test_workers_that_come_and_go_change_no_bit(chain: Chain, expected: torch.Tensor) -> None:
    torch.set_num_threads(3)
    for i in range(60):
        _C.rest_workers((0, 1e-4, 1e-3)[i % 3])
        assert torch.equal(chain.run(), expected)


@pytest.mark.parametrize(("rows", "pieces"), [(1, 3), (64, 3 * 64)])
def test_much_work_is_cut_smaller(rows: int, pieces: int) -> None:
    torch.set_num_threads(3)
    x, weight, out = random(rows, 512, seed=5), random(1536, 512, seed=6), torch.empty(rows, 1536)
    ops.linear(x, weight, out=out)  # makes the pool
    assert sum(pieces_of(lambda: ops.linear(x, weight, out=out))) == pieces


def test_many_python_threads(expected: torch.Tensor) -> None:
    torch.set_num_threads(3)
    chains, failures = [Chain() for _ in range(3)], []

    def work(chain: Chain) -> None:
        failures.extend(i for i in range(20) if not torch.equal(chain.run(), expected))

    callers = [threading.Thread(target=work, args=(chain,)) for chain in chains]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert failures == []


def in_a_child(work: Callable[[], bool]) -> int:
    """The exit status of a fork that does ``work``: 0 if it gives true."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_has_a_pool_of_its_own(chain: Chain, expected: torch.Tensor) -> None:
    torch.set_num_threads(3)
    chain.run()
    _C.rest_workers(1000)

    def work() -> bool:
        is_new = _C.pieces_by_thread() == []
        return is_new and torch.equal(chain.run(), expected)

    assert in_a_child(work) == 0


def test_threads_that_cannot_start_are_done_without(chain: Chain, expected: torch.Tensor) -> None:
    def work() -> bool:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = size + (40 << 20)  # a thread's stack takes 8 MiB of it
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.set_num_threads(64)
        is_equal = torch.equal(chain.run(), expected)
        return is_equal and 1 <= len(_C.pieces_by_thread()) < 64

    torch.set_num_threads(1)
    assert in_a_child(work) == 0


@pytest.mark.slow
def test_stress_under_a_thread_sanitizer(tmp_path: Path) -> None:
    csrc, source = ROOT / "csrc", Path(__file__).with_name("pool_stress.cpp")
    compiler, program = os.environ.get("CXX", "c++"), tmp_path / "stress"
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{csrc}"]
    sources = [source, csrc / "core/thread_pool.cpp"]
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the default count


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/a/b", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "200000 100000"}, 0.5),
        ("0::/../outside", {"cpu.max": "300000 100000"}, 3.0),
        (
            "4:memory:/x\n3:cpu,cpuacct:/docker/7\n0::/",
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        (
            "1:cpu:/pod",
            {"cpu/pod/cpu.cfs_quota_us": "-1", "cpu/pod/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("0::/", {"cpu.max": "a riddle"}, None),
        ("0::/", {}, None),
        ("", {"cpu.max": "100000 100000"}, None),
    ],
)
def test_quota_of_control_groups(
    tmp_path: Path, groups: str, files: dict[str, str], quota: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "groups").write_text(groups + "\n")
    assert cpu_quota(tmp_path / "groups", tmp_path) == quota


def test_no_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "count", "expected_count"),
    [(None, 8, 8), (1.5, 8, 1), (0.5, 8, 1), (2.0, 8, 2), (3.9, 4, 3), (64.0, 8, 8), (2.0, 6, 6)],
    ids=str,
)
def test_whole_cpus_of_a_quota(quota: float | None, count: int, expected_count: int) -> None:
    assert threads_within(quota, count, num_cpus=8) == expected_count


def test_default_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    for count, quotas in ((6, 2), (3, 2), (4, 4)):  # of six CPUs, of three cores, chosen
        torch.set_num_threads(count)
        respect_quota()
        assert torch.get_num_threads() == quotas
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    torch.set_num_threads(6)
    respect_quota()
    assert torch.get_num_threads() == 6
