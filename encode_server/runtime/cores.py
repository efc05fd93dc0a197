"""How many cores this process may use: the machine's, less what its affinity and its control groups leave out.

A container on a machine of 64 cores may have a quota of 4. Sixteen threads would use up a period's quota early, and all
of them would stand still until the next period.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def usable_cores(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole cores, at least one. `proc`, `mount`: where the kernel tells of control groups."""
    quota = min(_quotas(proc, mount), default=math.inf)
    affinity = len(os.sched_getaffinity(0))
    return max(1, math.floor(min(affinity, quota)))


def _quotas(proc: Path, mount: Path) -> Iterator[float]:
    """Cores granted by each control group that this process is in, and by those above it."""
    with contextlib.suppress(OSError):
        for line in proc.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _read_all(mount, path, _quota_v2)
            elif "cpu" in controllers.split(","):
                for name in ("cpu", controllers):
                    yield from _read_all(mount / name, path, _quota_v1)


def _read_all(root: Path, path: str, read: Callable[[Path], float]) -> Iterator[float]:
    # In a container without a cgroup namespace the path is the host's, and does not exist: its group is the root then.
    group = root / path.lstrip("/")
    while True:
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            yield read(group)
        if group == root or root not in group.parents:
            return
        group = group.parent


def _quota_v2(group: Path) -> float:
    quota, period = (group / "cpu.max").read_text().split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1(group: Path) -> float:
    quota = int((group / "cpu.cfs_quota_us").read_text())
    return math.inf if quota <= 0 else quota / int((group / "cpu.cfs_period_us").read_text())
