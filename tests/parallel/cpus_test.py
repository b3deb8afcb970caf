"""The number of CPUs: the affinity of the process and the quotas of its control groups."""

import os

import pytest

from convit_jax.parallel import cpus


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)), raising=False)


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return str(root)


V1 = "4:memory:/\n3:cpu,cpuacct:/docker/12ab"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 32),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 32),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "1000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "6400000 100000"}, 32),
        # The group above has the quota.
        (
            {
                "proc/self/cgroup": "0::/job/step",
                "sys/fs/cgroup/job/cpu.max": "400000 100000",
                "sys/fs/cgroup/job/step/cpu.max": "max 100000",
            },
            4,
        ),
        # The path of the host, of which the container sees only the last folder.
        ({"proc/self/cgroup": "0::/docker/1", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            32,
        ),
    ],
)
def test_a_quota_limits_the_cpus(many, tmp_path, files, expected):
    assert cpus.available(write(tmp_path, files)) == expected


def test_the_affinity_limits_the_cpus(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert cpus.available(str(tmp_path)) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cpus.available(str(tmp_path)) == 7
