"""Counts the CPUs that this process may use, which may be fewer than the machine has."""

import math
import os
import pathlib


def available(root: str = "/") -> int:
    """Returns the number of CPUs that this process may use, at least 1.

    The number is limited by the CPU affinity, which Slurm and `taskset` set, and by the CPU quota
    of the control group, which Docker (--cpus) and Kubernetes set. A quota of 2.5 CPUs counts as 3.

    Args:
      root: folder that holds proc/ and sys/; tests use another one.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        count = os.cpu_count() or 1
    return max(1, min([count, *map(math.ceil, _quotas(pathlib.Path(root)))]))


def _quotas(root: pathlib.Path) -> list[float]:
    """Returns the CPU quotas, in CPUs, of the control groups that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, read = root / "sys/fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            top, read = root / "sys/fs/cgroup/cpu", _quota_v1
        else:
            continue
        # A group is limited by the groups above it too. In a container the path may be the host's,
        # and only the top folder exists.
        parts = [part for part in path.split("/") if part]
        folders = [top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
        found += [quota for folder in folders if (quota := read(folder)) is not None]
    return found


def _quota_v2(folder: pathlib.Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(folder: pathlib.Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota < 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
