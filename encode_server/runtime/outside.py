"""Whether somebody outside of the server ended or stopped a process, as far as that can be known."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path


def killed_from_outside(code: int, oom_kills_before: int | None, oom_kills_now: int | None) -> bool:
    """Whether a process that this server did not kill was killed by somebody else. Processes of this server ignore
    SIGTERM and SIGINT, and the other signals are mostly a process' own doing.

    `code`: the exit code, minus the signal's number for a signal. `oom_kills_before`: what `OomKills.count` gave before
    the process took the memory for which the kernel may have killed it.
    """
    if code != -signal.SIGKILL:
        return False
    return oom_kills_before is None or oom_kills_now is None or oom_kills_now <= oom_kills_before


def stopped_from_outside(pid: int) -> bool:
    """Whether a process stands still because of a signal (SIGSTOP) or a debugger."""
    with contextlib.suppress(OSError, IndexError):
        # The name of the program, in brackets, may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


class OomKills:
    """How many processes the kernel has killed for lack of memory: of this process' control group where the kernel
    counts that, else of the whole machine."""

    def __init__(self, root: Path = Path("/")) -> None:
        """`root`: below it lie /proc and /sys."""
        # Found once: the count is read before each forward, and reading /proc/vmstat takes a tenth of a millisecond.
        self._file = next((file for file in _counting(root) if _count(file) is not None), None)

    def count(self) -> int | None:
        """None where nothing is known."""
        return None if self._file is None else _count(self._file)


def _counting(root: Path) -> Iterator[Path]:
    """Files that may hold the count, the best first."""
    groups = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kind, path = line.split(":", 2)
            if kind == "":
                yield groups / path.lstrip("/") / "memory.events"
            elif kind == "memory":
                yield groups / "memory" / path.lstrip("/") / "memory.oom_control"
    yield root / "proc/vmstat"


def _count(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            found, _, value = line.partition(" ")
            if found == "oom_kill":
                return int(value)
    return None
