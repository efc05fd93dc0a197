"""Threads are chosen by what a container grants, not by what its machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from encode_server.runtime.cores import usable_cores


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def cores(tmp_path: Path, lines: str, files: dict[str, str]) -> int:
    """On a machine with these files below its cgroup mount."""
    for name, text in files.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    (tmp_path / "cgroup").write_text(lines)
    return usable_cores(tmp_path / "cgroup", tmp_path / "mount")


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "400000 100000"}, 4),  # a container with a namespace of its own
        ("0::/\n", {"cpu.max": "max 100000"}, 16),
        ("0::/\n", {"cpu.max": "150000 100000"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/pod/app\n", {"pod/app/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3),  # the pod's bound
        ("0::/elsewhere\n", {"cpu.max": "200000 100000"}, 2),  # the host's path, which is not to be seen here
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "600000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 6),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "50000"}, 5),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("4:memory:/\n", {}, 16),
        ("0::/\n", {"cpu.max": "nonsense"}, 16),
        ("0::/\n", {"cpu.max": "3200000 100000"}, 16),  # more than there are
    ],
)
def test_quotas_bound_the_cores(tmp_path, lines, files, expected):
    assert cores(tmp_path, lines, files) == expected


def test_a_machine_that_tells_nothing_has_its_affinity(tmp_path):
    assert usable_cores(tmp_path / "none", tmp_path / "none") == 16
