"""How many cores this process may use: the machine's, less what its affinity and its control groups leave out.

A container on a machine of 64 cores may have a quota of 4. Sixteen threads would use up a period's quota early, and all
of them would stand still until the next period.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from encode_server.runtime.cgroups import MOUNT, PROC, granted


def usable_cores(proc: Path = PROC, mount: Path = MOUNT) -> int:
    """Whole cores, at least one. `proc`, `mount`: where the kernel tells of control groups."""
    quota = min(granted("cpu", _quota_v2, _quota_v1, proc, mount), default=math.inf)
    affinity = len(os.sched_getaffinity(0))
    return max(1, math.floor(min(affinity, quota)))


def _quota_v2(group: Path) -> float:
    quota, period = (group / "cpu.max").read_text().split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1(group: Path) -> float:
    quota = int((group / "cpu.cfs_quota_us").read_text())
    return math.inf if quota <= 0 else quota / int((group / "cpu.cfs_period_us").read_text())
