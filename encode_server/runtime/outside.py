"""Whether somebody outside of the server ended or stopped a process, as far as that can be known."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path


def killed_from_outside(code: int, oom_kills_before: int | None) -> bool:
    """Whether a process that this server did not kill was killed by somebody else. Processes of this server ignore
    SIGTERM and SIGINT, and the other signals are mostly a process' own doing.

    `code`: the exit code, minus the signal's number for a signal. `oom_kills_before`: what `oom_kills` gave before the
    process took the memory for which the kernel may have killed it.
    """
    if code != -signal.SIGKILL:
        return False
    now = oom_kills()
    return oom_kills_before is None or now is None or now <= oom_kills_before


def stopped_from_outside(pid: int) -> bool:
    """Whether a process stands still because of a signal (SIGSTOP) or a debugger."""
    with contextlib.suppress(OSError, IndexError):
        # The name of the program, in brackets, may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes the kernel has killed for lack of memory: of this process' control group where the kernel
    counts that, else of the whole machine. None where nothing is known."""
    groups = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kind, path = line.split(":", 2)
            if kind == "":
                found = _count(groups / path.lstrip("/") / "memory.events", "oom_kill")
            elif kind == "memory":
                found = _count(groups / "memory" / path.lstrip("/") / "memory.oom_control", "oom_kill")
            else:
                continue
            if found is not None:
                return found
    return _count(root / "proc/vmstat", "oom_kill")


def _count(file: Path, name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            found, _, value = line.partition(" ")
            if found == name:
                return int(value)
    return None
