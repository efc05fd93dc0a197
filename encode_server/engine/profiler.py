"""torch's profiler around a rank's forwards, its trace written to a file.

A profile is bounded, because the rank pays for it: 220 bytes for each event while it records, seven times as much and
about 7 µs when it ends, on the thread that executes commands. Another thread writes the trace.
"""

from __future__ import annotations

import ctypes
import gzip
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from encode_server.engine.device import profiler_activity
from encode_server.engine.profile_limits import MAX_BYTES, MAX_SECONDS, PART

WRITE_NICE = 19  # of the thread that writes


class Profiler:
    """At most one profile at a time. `device`: of the rank's encoder."""

    def __init__(self, device: str, used_bytes: Callable[[], int] | None = None) -> None:
        """`used_bytes`: the memory that this process uses; `heap_bytes` where not given."""
        self._device, self._used_bytes = device, used_bytes or heap_bytes
        self._profile: Any = None
        self._path = Path()
        self._forwards_left: int | None = None
        self._ends_at = 0.0
        self._least_used = 0
        self._writer: Thread | None = None

    @property
    def running(self) -> bool:
        """Whether forwards are being recorded: only those of the thread that calls `start` are."""
        return self._profile is not None

    def start(self, path: str, forwards: int | None) -> None:
        """Profile until `stop`, for so many forwards, or up to a bound. Raises ValueError when a profile is running or
        being written, OSError when there can be no such file."""
        from torch.profiler import ProfilerActivity, profile

        if self._profile is not None:
            raise ValueError("a profile is already running")
        # By the file, as whoever waits for the trace does: the thread itself ends a moment later.
        if self._writer is not None and self._writer.is_alive() and Path(f"{self._path}{PART}").exists():
            raise ValueError("the trace of the last profile is still being written")
        part = Path(path + PART)
        part.touch()
        activities = [ProfilerActivity.CPU]
        if self._device != "cpu":
            activities.append(profiler_activity(self._device))
        started = profile(activities=activities)
        try:
            started.start()
        except BaseException:
            part.unlink()
            raise
        self._profile, self._path, self._forwards_left = started, Path(path), forwards
        self._ends_at, self._least_used = time.monotonic() + MAX_SECONDS, self._used_bytes()

    def stop(self) -> None:
        """End the profile and begin to write its trace. Raises ValueError when none is running."""
        if self._profile is None:
            raise ValueError("no profile is running: one ends by itself after its forwards")
        ended, self._profile = self._profile, None
        ended.stop()
        self._writer = Thread(target=_write, args=(ended, self._path), name="trace", daemon=True)
        self._writer.start()

    def forwarded(self) -> None:
        """Count a forward; the last one asked for ends the profile."""
        if self._profile is not None and self._forwards_left is not None:
            self._forwards_left -= 1
        self.look()

    def look(self) -> None:
        """End a profile that has come to a bound. Called whenever the rank has executed a command."""
        if self._profile is None:
            return
        used = self._used_bytes()
        # Another thread may still have executed a forward when the profile began.
        self._least_used = min(self._least_used, used)
        if self._forwards_left == 0 or time.monotonic() > self._ends_at or used - self._least_used > MAX_BYTES:
            self.stop()

    def close(self) -> None:
        """Wait for a trace that is being written."""
        if self._writer is not None:
            self._writer.join()


def _write(profile: Any, path: Path) -> None:
    """Write the trace, compressed; where that fails there is no file."""
    os.setpriority(os.PRIO_PROCESS, 0, WRITE_NICE)  # of this thread, in Linux
    part, plain = Path(f"{path}{PART}"), Path(f"{path}{PART}.json")
    try:
        profile.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(part, "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        part.rename(path)
    finally:
        plain.unlink(missing_ok=True)
        part.unlink(missing_ok=True)


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "k")
    ]


def heap_bytes() -> int:
    """Bytes of the heap in use. Where the C library does not tell, the bytes of memory that the process has."""
    libc = ctypes.CDLL(None)
    try:
        libc.mallinfo2.restype = _MallInfo
        found = libc.mallinfo2()
    except AttributeError:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(found.uordblks + found.hblkhd)
