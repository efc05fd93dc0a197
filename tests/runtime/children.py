"""What the tests have the forkserver call: entries of children, and functions of `Forkserver.call`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from encode_server.errors import StartupError


def nothing(argument: bytes) -> None:
    """A setup that imports nothing."""


def slowly(argument: bytes) -> None:
    """A setup that takes until the file that `argument` names exists."""
    while not Path(argument.decode()).exists():
        time.sleep(0.005)


def broken(argument: bytes) -> None:
    """A setup that fails."""
    raise ImportError("no such library")


def exits(argument: bytes, fds: Sequence[int]) -> int:
    """Exit with the number that `argument` is."""
    return int(argument)


def fails(argument: bytes, fds: Sequence[int]) -> int:
    """Raise."""
    raise ValueError("as the test wants it")


def dies(argument: bytes, fds: Sequence[int]) -> int:
    """Die of the signal that `argument` is."""
    os.kill(os.getpid(), int(argument))
    return 0


def sleeps(argument: bytes, fds: Sequence[int]) -> int:
    """Never end; `argument` is the path of a file to make first."""
    if argument:
        Path(argument.decode()).write_text(str(os.getpid()))
    time.sleep(3600)
    return 0


def sleeps_after(argument: bytes, fds: Sequence[int]) -> int:
    """Write to the descriptor handed over, then never end."""
    os.write(fds[0], argument)
    time.sleep(3600)
    return 0


def spins(argument: bytes, fds: Sequence[int]) -> int:
    """Use one core, the same as others of its kind."""
    os.sched_setaffinity(0, {int(argument)})
    while True:
        pass


def writes(argument: bytes, fds: Sequence[int]) -> int:
    """Write `argument` to the descriptor handed over, and tell the process' name."""
    os.write(fds[0], argument + b" by " + Path("/proc/self/comm").read_bytes().strip())
    return 0


def echo(argument: bytes, fds: Sequence[int]) -> int:
    """Send back every message on the link that `argument` names, until `end`."""
    import zmq

    from encode_server.runtime.channel import Channel

    channel = Channel(zmq.Context(), argument.decode())
    while (frames := channel.receive())[0] != b"end":
        channel.send(b"".join(frames))
    channel.close()
    return 0


def add(numbers: list[int]) -> int:
    """The sum."""
    return sum(numbers)


def large(size: int) -> bytes:
    """So many bytes."""
    return bytes(size)


def refuses(reason: str) -> None:
    """Raise StartupError."""
    raise StartupError(reason)


def vanishes(_: Any) -> None:
    """End without a result."""
    os.kill(os.getpid(), signal.SIGKILL)


def stays(path: str) -> None:
    """Never end, after making a file."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(3600)


def threads_and_cuda(_: Any) -> dict[str, Any]:
    """Of the forkserver, asked in its child: its threads, and whether torch is there with CUDA untouched."""
    import sys

    torch = sys.modules.get("torch")
    maps = Path("/proc/self/maps").read_text()
    return {
        "threads": len(list(Path(f"/proc/{os.getppid()}/task").iterdir())),
        "torch": torch is not None,
        "cuda": bool(torch is not None and torch.cuda.is_initialized()),
        "device_open": "/dev/nvidia" in maps,
    }
