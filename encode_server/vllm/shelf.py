"""Embeddings in shared memory, by identifier: written by vLLM's scheduler process, read by its workers on this host."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "encode-server-ec-"


@dataclass(frozen=True)
class Entry:
    """One embedding: `shape` = [tokens, dim] values of `dtype`, row-major, in the file `path`."""

    path: str
    dtype: str
    shape: tuple[int, int]
    nbytes: int


class Shelf:
    """At most `max_bytes` of embeddings. The entry used longest ago goes first, and none that was used within `lease_s`
    seconds: a worker may be about to read the entry. Used from any thread."""

    def __init__(self, max_bytes: int, lease_s: float, root: Path = SHARED_MEMORY) -> None:
        _sweep(root)
        self._max_bytes, self._lease_s = max_bytes, lease_s
        self._directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=root))
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # the one used last is the last
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()
        self._count = 0
        self.bytes = 0

    def put(self, identifier: str, dtype: str, shape: tuple[int, int], data: memoryview) -> bool:
        """Keep an embedding; False where there is no room for it. A second one of the same name changes nothing: a name
        stands for one content."""
        with self._lock:
            if identifier in self._entries:
                self._touch(identifier)
                return True
            if not self._make_room(data.nbytes):
                return False
            self._count += 1
            # Never the identifier itself: strangers choose it.
            name = f"{self._count}-{hashlib.sha256(identifier.encode(errors='surrogatepass')).hexdigest()[:32]}"
            self.bytes += data.nbytes
        path = self._directory / name
        try:
            path.write_bytes(data)
        except OSError:
            path.unlink(missing_ok=True)
            with self._lock:
                self.bytes -= data.nbytes
            return False
        with self._lock:
            self._entries[identifier] = Entry(str(path), dtype, shape, data.nbytes)
            self._touch(identifier)
        return True

    def get(self, identifier: str) -> Entry | None:
        """The entry, kept for at least `lease_s` seconds from now."""
        with self._lock:
            if identifier in self._entries:
                self._touch(identifier)
            return self._entries.get(identifier)

    def drop(self, identifier: str) -> None:
        """Forget an entry."""
        with self._lock:
            self._remove(identifier)

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._max_bytes = 0
        shutil.rmtree(self._directory, ignore_errors=True)

    def _touch(self, identifier: str) -> None:
        self._entries.move_to_end(identifier)
        self._used[identifier] = time.monotonic()

    def _make_room(self, nbytes: int) -> bool:
        until = time.monotonic() - self._lease_s
        while self.bytes + nbytes > self._max_bytes:
            oldest = next(iter(self._entries), None)
            if oldest is None or self._used[oldest] > until:
                return False
            self._remove(oldest)
        return True

    def _remove(self, identifier: str) -> None:
        if (entry := self._entries.pop(identifier, None)) is not None:
            del self._used[identifier]
            self.bytes -= entry.nbytes
            with contextlib.suppress(OSError):
                Path(entry.path).unlink()


def _sweep(root: Path) -> None:
    """Remove what processes left behind that were killed."""
    for path in root.glob(PREFIX + "*"):
        if (owner := re.match(rf"{PREFIX}(\d+)-", path.name)) and not Path(f"/proc/{owner[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)
