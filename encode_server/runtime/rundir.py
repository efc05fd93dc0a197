"""The private directory of the ipc sockets, and the sweeping of those that a killed server left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from encode_server.errors import StartupError

PREFIX = "encode-server-"
SOCKET = "link"  # the only file in it
LONGEST = 107  # bytes of the path of a socket, see unix(7)
FALLBACK = "/tmp"


def roots() -> list[str]:
    """Where run directories may be: the directory for temporary files, if the paths of sockets in it are not too long,
    else /tmp."""
    name = PREFIX + 8 * "x"  # as mkdtemp makes it
    found = dict.fromkeys((tempfile.gettempdir(), FALLBACK))
    return [root for root in found if len(os.fsencode(f"{root}/{name}/{SOCKET}")) <= LONGEST]


class RunDirectory:
    """A 0700 directory that exists until the child has connected. Locked while its owner lives, so that a stale one can
    be told. `socket`: the path at which the owner listens."""

    def __init__(self) -> None:
        """Raises StartupError where no such directory can be made."""
        root = roots()[0]
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise StartupError(f"no directory for sockets can be made in {root} (TMPDIR): {reason}") from None
        self.socket = self.path / SOCKET
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Delete it; what is connected stays connected. May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep_stale() -> list[Path]:
    """Remove run directories of this user whose owner is gone (killed while its ranks were loading)."""
    removed = []
    for path in (path for root in roots() for path in Path(root).glob(PREFIX + "*")):
        try:
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
        except OSError:  # its owner lives
            pass
        finally:
            os.close(descriptor)
    return removed
