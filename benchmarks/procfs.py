"""What processes have used, as the kernel counts it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """CPU seconds so far: of the front's event loop, of its other threads, and of all ranks."""

    loop: float
    pool: float
    ranks: float

    def since(self, earlier: Usage) -> Usage:
        """What was used between the two."""
        return Usage(self.loop - earlier.loop, self.pool - earlier.pool, self.ranks - earlier.ranks)


def usage(front: int) -> Usage:
    """Of the server whose front is process `front`."""
    threads = _threads(front)
    loop = threads.pop(front, 0.0)
    return Usage(loop, sum(threads.values()), sum(sum(_threads(child).values()) for child in children(front)))


def children(parent: int) -> list[int]:
    """Processes started by `parent` that exist."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _parent(int(entry.name)) == parent:
            found.append(int(entry.name))
    return found


def rss_bytes(pid: int) -> int:
    """Resident memory of a process that is its own: shared pages (the arena) are not counted."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def _threads(pid: int) -> dict[int, float]:
    """CPU seconds by thread."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            # Nanoseconds; `stat` counts in hundredths of a second, too coarse for some threads.
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            try:
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                found[int(task.name)] = (int(fields[11]) + int(fields[12])) * TICK_S
            except OSError:  # it has just ended
                pass
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return -1
