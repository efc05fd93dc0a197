"""The control groups of this process, and what they grant."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PROC = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


def granted(
    controller: str,
    read_v2: Callable[[Path], T],
    read_v1: Callable[[Path], T],
    proc: Path = PROC,
    mount: Path = MOUNT,
) -> Iterator[T]:
    """What `controller` (`cpu`, `memory`) grants to each group that this process is in, and to the groups above it.
    The functions read a group's folder; what raises OSError, ValueError or ZeroDivisionError says nothing. `proc`,
    `mount`: where the kernel tells of control groups."""
    with contextlib.suppress(OSError):
        for line in proc.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _upwards(mount, path, read_v2)
            elif controller in controllers.split(","):
                for name in dict.fromkeys((controller, controllers)):
                    yield from _upwards(mount / name, path, read_v1)


def _upwards(root: Path, path: str, read: Callable[[Path], T]) -> Iterator[T]:
    # In a container without a cgroup namespace the path is the host's, and does not exist: its group is the root then.
    group = root / path.lstrip("/")
    while True:
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            yield read(group)
        if group == root or root not in group.parents:
            return
        group = group.parent
