"""Memory that a transport knows from the start, for embeddings on their way out.

To register memory with an RDMA device pins its pages, which takes as long as a transfer. Embeddings that lie in memory
registered once are sent without that. Whoever holds a view of an embedding keeps its room; when the last view dies, in
whichever thread, the room is free. The cache, a second receiver, a retry, and a socket that still sends need no rule.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np

from encode_server.engine.region import Region, Slot
from encode_server.wire.layout import ALIGNMENT, aligned


class Outgoing:
    """One block of `nbytes` bytes, mapped as long as a view of it lives. Used from any thread."""

    def __init__(self, nbytes: int, on_full: Callable[[], None] = lambda: None) -> None:
        """`on_full`: called for each embedding that finds no room, in whichever thread."""
        # Shared memory: with private memory a fork could move the pages away from where the transport knows them.
        self._bytes = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        self.address, self.max_bytes = int(self._bytes.ctypes.data), nbytes
        self._on_full = on_full
        self._region = Region(0, nbytes)
        self._lock = threading.Lock()
        self._returned: deque[Slot] = deque()
        self._used = 0

    @property
    def used_bytes(self) -> int:
        """Bytes that views hold."""
        with self._lock:
            self._take_back()
            return self._used

    def copy(self, *pieces: memoryview) -> memoryview | None:
        """The pieces one after another, in this memory; None where there is no room for them. Never waits."""
        nbytes = sum(piece.nbytes for piece in pieces)
        if not nbytes or (slot := self._take(nbytes)) is None:
            return None
        room = self._bytes[slot.offset : slot.offset + nbytes]
        # The end of a view only notes its slot: it may come out of a garbage collection in a thread that has the lock.
        weakref.finalize(room, self._returned.append, slot).atexit = False
        begin = 0
        for piece in pieces:
            room[begin : begin + piece.nbytes] = np.frombuffer(piece, np.uint8)
            begin += piece.nbytes
        return room.data

    def holds(self, data: memoryview) -> bool:
        """Whether the bytes lie in this memory."""
        return bool(data.nbytes) and self.address <= address_of(data) < self.address + self.max_bytes

    def _take(self, nbytes: int) -> Slot | None:
        with self._lock:
            self._take_back()
            slot = self._region.take(max(ALIGNMENT, aligned(nbytes)))
            if slot is not None:
                self._used += slot.size
        if slot is None:
            self._on_full()
        return slot

    def _take_back(self) -> None:
        while self._returned:
            slot = self._returned.popleft()
            self._region.give(slot)
            self._used -= slot.size


def address_of(data: memoryview) -> int:
    """Where the bytes, at least one, begin in this process's memory."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)
