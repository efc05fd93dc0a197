"""Embeddings in shared memory, by identifier: written by vLLM's scheduler process, read by its workers on this host."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """One embedding: `shape` = [tokens, dim] values of `dtype`, row-major, at `offset` of the memory `path`."""

    path: str
    offset: int
    dtype: str
    shape: tuple[int, int]
    nbytes: int


class Shelf:
    """At most `max_bytes` of embeddings. The entry used longest ago goes first, and none that is held, or that was used
    within `lease_s` seconds: a worker may be about to read the entry. Used from any thread.

    The memory is an anonymous file: other processes of this user open it under `/proc`, nothing of it is left when this
    process ends, however it ends, and a container's small `/dev/shm` does not limit it.
    """

    def __init__(self, max_bytes: int, lease_s: float) -> None:
        self._lease_s = lease_s
        self._fd = os.memfd_create("encode-server-ec")
        os.ftruncate(self._fd, max_bytes)
        self._path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # the one used last is the last
        self._used: dict[str, float] = {}
        self._holders: dict[str, set[str]] = {}  # of an entry, by the entry's identifier
        self._free = [(0, max_bytes)]  # (offset, bytes), by offset, none next to another
        self._lock = threading.Lock()
        self._closed = False

    @property
    def bytes(self) -> int:
        """Of all entries."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def put(self, identifier: str, dtype: str, shape: tuple[int, int], data: memoryview) -> bool:
        """Keep an embedding; False where there is no room for it. A second one of the same name changes nothing: a name
        stands for one content."""
        with self._lock:
            if identifier in self._entries:
                self._touch(identifier)
                return True
            offset = self._make_room(data.nbytes)
            if offset is None:
                return False
        entry = Entry(self._path, offset, dtype, shape, data.nbytes)
        try:
            self._write(data, offset)
        except OSError:
            with self._lock:
                self._give_back(entry)
            return False
        with self._lock:
            self._entries[identifier] = entry
            self._touch(identifier)
        return True

    def get(self, identifier: str) -> Entry | None:
        """The entry, kept for at least `lease_s` seconds from now."""
        with self._lock:
            if identifier in self._entries:
                self._touch(identifier)
            return self._entries.get(identifier)

    def hold(self, identifier: str, holder: str) -> None:
        """Keep an entry until `holder` releases the entry."""
        with self._lock:
            if identifier in self._entries:
                self._holders.setdefault(identifier, set()).add(holder)

    def release(self, identifier: str, holder: str) -> None:
        """`holder` does not need the entry any more."""
        with self._lock:
            holders = self._holders.get(identifier, set())
            holders.discard(holder)
            if not holders:
                self._holders.pop(identifier, None)

    def drop(self, identifier: str) -> None:
        """Forget an entry."""
        with self._lock:
            self._remove(identifier)

    def close(self) -> None:
        """Give the memory back. Nobody puts anything any more."""
        with self._lock:
            self._entries.clear()
            if not self._closed:
                os.close(self._fd)
            self._closed = True

    def _write(self, data: memoryview, offset: int) -> None:
        view = data.cast("B")
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def _touch(self, identifier: str) -> None:
        self._entries.move_to_end(identifier)
        self._used[identifier] = time.monotonic()

    def _make_room(self, nbytes: int) -> int | None:
        until = time.monotonic() - self._lease_s
        while (offset := self._take(nbytes)) is None:
            oldest = next((name for name in self._entries if name not in self._holders), None)
            if oldest is None or self._used[oldest] > until:
                return None
            self._remove(oldest)
        return offset

    def _remove(self, identifier: str) -> None:
        if (entry := self._entries.pop(identifier, None)) is not None:
            del self._used[identifier]
            self._holders.pop(identifier, None)
            self._give_back(entry)

    def _take(self, nbytes: int) -> int | None:
        """The first hole that is large enough."""
        size = _aligned(nbytes)
        for index, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[index : index + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        return None

    def _give_back(self, entry: Entry) -> None:
        joined: list[tuple[int, int]] = []
        for offset, room in sorted([*self._free, (entry.offset, _aligned(entry.nbytes))]):
            if joined and sum(joined[-1]) == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + room)
            else:
                joined.append((offset, room))
        self._free = joined


def read(entry: Entry, into: memoryview) -> None:
    """Copy an entry's bytes, in any process of this host. Raises OSError."""
    fd = os.open(entry.path, os.O_RDONLY)
    try:
        done = 0
        while done < entry.nbytes and (count := os.preadv(fd, [into[done:]], entry.offset + done)):
            done += count
    finally:
        os.close(fd)
    if done < entry.nbytes:
        raise OSError(f"{done} of {entry.nbytes} bytes")


def _aligned(nbytes: int) -> int:
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT
