"""Bytes that arrive in pieces: a request's body, or a download."""

from __future__ import annotations

import mmap

FIRST_BYTES = 64 << 10
HUGE_BYTES = 8 << 20  # from here on, pages of 2 MiB: at most a quarter more memory than has arrived

Raw = bytes | bytearray | mmap.mmap
"""Bytes that can be searched, sliced and decoded where they lie."""


class Arriving:
    """Pieces one after another; what is large lies in memory of its own that goes back to the kernel with this object.

    Not a list of pieces: two bytes that come by themselves would take 56 bytes. Nor memory of the C library, which
    keeps nearly all of what many downloads held for as long as something small lies behind it, and which copies what
    has come already, 10 ms for 16 MB, again and again as it grows.
    """

    def __init__(self) -> None:
        self._small = bytearray()
        self._map: mmap.mmap | None = None
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, piece: bytes) -> None:
        """Keep a piece."""
        end = self._size + len(piece)
        if self._map is None and end <= FIRST_BYTES:
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
            try:
                self._map.close()
            except BufferError:
                pass
        self._map, self._size, self._small = None, 0, bytearray()

    def take(self) -> bytes:
        """A copy of all that has arrived; this object is empty afterwards."""
        taken = bytes(self._small) if self._map is None else self._map[: self._size]
        self.close()
        return taken

    def _mapped(self, nbytes: int) -> mmap.mmap:
        """The memory, with room for `nbytes`. Growth copies nothing, and pages count once they are written."""
        if self._map is None:
            self._map = mmap.mmap(-1, max(4 * FIRST_BYTES, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._map[: self._size] = self._small
            self._small = bytearray()
        elif nbytes > len(self._map):
            self._map.resize(max(2 * len(self._map), nbytes))
            if len(self._map) > HUGE_BYTES:
                try:
                    self._map.madvise(mmap.MADV_HUGEPAGE)
                except OSError:  # a kernel without them
                    pass
        return self._map
