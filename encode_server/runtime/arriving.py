"""Bytes that arrive in pieces."""

from __future__ import annotations

import mmap

FIRST_BYTES = 64 << 10


class Arriving:
    """Pieces one after another, in memory of their own that goes back to the kernel with this object.

    Not a list of pieces: two bytes that come by themselves would take 56 bytes. Nor memory of the C library, which
    keeps nearly all of what many downloads held for as long as something small lies behind it.
    """

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, piece: bytes) -> None:
        """Keep a piece."""
        end = self._size + len(piece)
        if self._map is None:
            room = max(FIRST_BYTES, end)
            self._map = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        elif end > len(self._map):
            self._map.resize(max(2 * len(self._map), end))  # copies nothing, and pages count once they are written
        self._map[self._size : end] = piece
        self._size = end

    def close(self) -> None:
        """Give the memory back to the kernel, which takes some 100 ms for a gigabyte: a matter for a thread."""
        if self._map is not None:
            self._map.close()
        self._map, self._size = None, 0

    def take(self) -> bytes:
        """All that has arrived; this object is empty afterwards."""
        if self._map is None:
            return b""
        with self._map as held:
            taken = held[: self._size]
        self._map, self._size = None, 0
        return taken
