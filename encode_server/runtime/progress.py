"""Whether a process gets on with its work, or waits for a core, or does neither.

A rank that is late on a busy machine is not a hanging rank. The kernel counts for every thread how long it waited for a
core although it could have run (`/proc/PID/task/TID/schedstat`, second number, nanoseconds); a thread that is stopped
or waits for something that never comes does not count up.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

Waited = dict[str, float]
"""Thread → seconds for which the thread has waited for a core."""


def waited(pid: int) -> Waited:
    """How long each thread of the process has waited for a core since the thread began. Empty where the kernel does not
    say."""
    return {thread: seconds for thread, _, seconds in _threads(pid)}


def starved_seconds(pid: int, before: Waited) -> float:
    """How long the process' most starved thread has waited for a core since `waited` gave `before`."""
    return max((seconds - before.get(thread, 0.0) for thread, seconds in waited(pid).items()), default=0.0)


def active_seconds(pid: int) -> float:
    """Seconds that the process' threads have run, or have waited for a core, in all."""
    return sum(ran + seconds for _, ran, seconds in _threads(pid))


def _threads(pid: int) -> list[tuple[str, float, float]]:
    """For each thread, seconds that the thread ran and seconds that it waited for a core."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                ran, seconds = (task / "schedstat").read_text().split()[:2]
                found.append((task.name, int(ran) / 1e9, int(seconds) / 1e9))
    return found
