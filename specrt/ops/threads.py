"""How many threads kernels run on, where the user has not said; and on which CPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from specrt import _C

_CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torch's, read when it is loaded


def cpu_quota(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """How many CPUs' time this process's control groups grant it; None: no limit, or none told.

    Args:
        groups: which groups the process is in, a line ``id:controllers:path`` for each hierarchy.
        mount: where control groups are mounted, version 2 or version 1 with its controllers.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    quotas = [quota for folder in _cpu_groups(lines, mount) for quota in _quota_of(folder)]
    return min(quotas, default=None)


def _cpu_groups(lines: list[str], mount: Path) -> Iterator[Path]:
    """Folders that may limit the CPU: the groups' own and those above them.

    A container often sees its own group as the mount's root, whatever its path is outside.
    """
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            root = mount
        elif "cpu" in controllers.split(","):
            root = mount / controllers
            root = root if root.is_dir() else mount / "cpu"
        else:
            continue
        group = Path(path.strip("/"))
        yield root
        yield from (root / folder for folder in (group, *group.parents) if ".." not in group.parts)


def _quota_of(group: Path) -> Iterator[float]:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return


def threads_within(quota: float | None, threads: int, num_cpus: int) -> int:
    """``threads``, or as many whole CPUs as the quota gives where ``threads`` is torch's default.

    A thread beyond the quota would only have all of them stopped for the rest of each period: 1.5
    CPUs run one thread, and less than one run one too.

    Args:
        quota: in CPUs; None where there is no limit.
        threads: torch's count.
        num_cpus: that the process may run on; torch's default is one thread for each, or for two
            that share a core. Another count was chosen by somebody, and stays.
    """
    is_default = threads in (num_cpus, num_cpus // 2)
    return threads if quota is None or not is_default else max(1, min(threads, int(quota)))


def respect_quota() -> None:
    """Lower torch's thread count to the CPU quota, unless the environment or a call chose it."""
    if any(os.environ.get(name) for name in _CHOSEN_BY) or not hasattr(os, "sched_getaffinity"):
        return
    threads = torch.get_num_threads()
    allowed = threads_within(cpu_quota(), threads, len(os.sched_getaffinity(0)))
    if allowed < threads:
        torch.set_num_threads(allowed)


def worker_cpus() -> list[int]:
    """The CPUs that a pool of so many threads as torch has now keeps its workers on, ascending.

    One of each core of the calling thread's socket if that has so many cores, or of all cores;
    empty where the system places threads: where it does not tell what shares a core, where there
    are fewer cores than threads or nothing to choose from, and where ``SPECRT_AFFINITY`` is "off".
    """
    return _C.worker_cpus(torch.get_num_threads())
