"""What the processes of a server have used and hold, as the kernel counts it.

The front's child is the forkserver, whose children are the ranks and the preparers; a process' name says which it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """CPU seconds so far: of the front's event loop, of its other threads, of all preparers, of all ranks, and of what
    else the front has started (the forkserver, and its children of one call)."""

    loop: float
    threads: float
    preparers: float
    ranks: float
    others: float

    @property
    def front(self) -> float:
        """The loop and the front's other threads."""
        return self.loop + self.threads

    def since(self, earlier: Usage) -> Usage:
        """What was used between the two. A process that has ended meanwhile takes its time along."""
        return Usage(*(getattr(self, part.name) - getattr(earlier, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Memory:
    """Bytes that a process holds: resident; its share of the resident pages (each divided by the number of processes
    that map the page); and pages that are its own alone."""

    rss: int
    pss: int
    private: int


@dataclass(frozen=True)
class Process:
    """A process that exists. `name`: 15 characters at most, `rank 0`, `preparer 1`, `forkserver`, …"""

    pid: int
    name: str

    @property
    def kind(self) -> str:
        """`rank`, `preparer`, `forkserver`, …"""
        return self.name.partition(" ")[0]


def usage(front: int) -> Usage:
    """Of the server whose front is process `front`."""
    threads = _thread_seconds(front)
    loop = threads.pop(front, 0.0)
    by_kind: dict[str, float] = {}
    for process in descendants(front):
        by_kind[process.kind] = by_kind.get(process.kind, 0.0) + cpu_seconds(process.pid)
    preparers, ranks = by_kind.pop("preparer", 0.0), by_kind.pop("rank", 0.0)
    return Usage(loop, sum(threads.values()), preparers, ranks, sum(by_kind.values()))


def cpu_seconds(pid: int) -> float:
    """CPU seconds of the threads that the process has now."""
    return sum(_thread_seconds(pid).values())


def descendants(ancestor: int) -> list[Process]:
    """Every process that `ancestor` started, or that a process started by it started, in the order of their names."""
    parents = {pid: parent for pid in _pids() if (parent := _parent(pid)) is not None}
    found, generation = [], {ancestor}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        found += [Process(pid, name) for pid in generation if (name := _name(pid))]
    return sorted(found, key=lambda process: (process.name, process.pid))


def ranks(front: int) -> list[int]:
    """The rank processes of a server, in the order of their ranks."""
    return of_kind(front, "rank")


def preparers(front: int) -> list[int]:
    """The preparer processes of a server, in the order of their numbers."""
    return of_kind(front, "preparer")


def of_kind(front: int, kind: str) -> list[int]:
    """The processes of a server whose name begins with `kind`."""
    return [process.pid for process in descendants(front) if process.kind == kind]


def memory(pid: int) -> Memory:
    """What the process holds now. Raises OSError when the process is gone."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    amounts = {name: int(kb) << 10 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return Memory(amounts["Rss"], amounts["Pss"], amounts["Private_Clean"] + amounts["Private_Dirty"])


def rss_bytes(pid: int) -> int:
    """Resident memory of a process that is its own: shared pages (the arena) are not counted."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def shared_memory(pid: int) -> set[str]:
    """Files in /dev/shm that the process has mapped, by name."""
    try:
        return set(re.findall(r"/dev/shm/(.+?)(?: \(deleted\))?$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE))
    except OSError:  # it has just ended
        return set()


def _pids() -> Iterable[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _name(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None


def _thread_seconds(pid: int) -> dict[int, float]:
    """CPU seconds by thread."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            # Nanoseconds; `stat` counts in hundredths of a second, too coarse for some threads.
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            try:
                numbers = (task / "stat").read_text().rpartition(")")[2].split()
                found[int(task.name)] = (int(numbers[11]) + int(numbers[12])) * TICK_S
            except OSError:  # it has just ended
                pass
    return found


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None
