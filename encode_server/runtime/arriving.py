"""Bytes that arrive in pieces: a request's body, or a download."""

from __future__ import annotations

import contextlib
import mmap

FIRST_BYTES = 64 << 10
BODY_BYTES = 4 << 20  # of a request's body: the C library has memory for the next one ready, a map is filled anew
HUGE_BYTES = 8 << 20  # a map of this size has pages of 2 MiB: far fewer to fill, the last of them in part

Raw = bytes | bytearray | mmap.mmap
"""Bytes that can be searched, sliced and decoded where they lie."""


class Arriving:
    """Pieces one after another. What is longer than `first_bytes` lies in memory of its own, which goes back to the
    kernel with this object.

    Not a list of pieces: two bytes that come by themselves would take 56 bytes. Nor memory of the C library, which
    keeps nearly all of what many downloads held for as long as something small lies behind it, and which copies what
    has come already, 10 ms for 16 MB, again and again as it grows.
    """

    def __init__(self, first_bytes: int = FIRST_BYTES) -> None:
        self._first_bytes = first_bytes
        self._small = bytearray()
        self._map: mmap.mmap | None = None
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, piece: bytes) -> None:
        """Keep a piece."""
        end = self._size + len(piece)
        if self._map is None and end <= self._first_bytes:
            self._small += piece
        else:
            self._mapped(end)[self._size : end] = piece
        self._size = end

    def whole(self) -> bytearray | mmap.mmap:
        """All that has arrived, where it lies: nothing may be appended any more."""
        if self._map is None:
            return self._small
        self._map.resize(self._size)
        return self._map

    def close(self) -> None:
        """Give the memory back to the kernel, which takes up to 60 ms for a gigabyte: a matter for a thread. What
        somebody still looks at stays until they are done."""
        if self._map is not None:
            with contextlib.suppress(BufferError):
                self._map.close()
        self._map, self._size, self._small = None, 0, bytearray()

    def take(self) -> bytes:
        """A copy of all that has arrived; this object is empty afterwards."""
        taken = bytes(self._small) if self._map is None else self._map[: self._size]
        self.close()
        return taken

    def _mapped(self, nbytes: int) -> mmap.mmap:
        """The memory, with room for `nbytes`. Growth copies nothing, and pages count once they are written."""
        if self._map is None:
            room = max(4 * FIRST_BYTES, 2 * self._first_bytes, nbytes)
            self._map = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._advise(self._map)
            self._map[: self._size] = self._small
            self._small = bytearray()
        elif nbytes > len(self._map):
            self._map.resize(max(2 * len(self._map), nbytes))
            self._advise(self._map)
        return self._map

    @staticmethod
    def _advise(memory: mmap.mmap) -> None:
        if len(memory) >= HUGE_BYTES:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
