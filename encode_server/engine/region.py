"""Which ranges of a block of memory are free."""

from __future__ import annotations

import bisect
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A granted range of shared or registered memory: `offset` and `size` in bytes."""

    offset: int
    size: int


class Region:
    """First fit with coalescing over [start, start + size), in bytes. Of one thread at a time."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size
        self._holes: list[tuple[int, int]] = [(start, size)]  # (offset, size), by offset, never adjacent

    def take(self, size: int) -> Slot | None:
        """The first hole's beginning that has `size` bytes; None where no hole has."""
        for index, (offset, hole) in enumerate(self._holes):
            if hole >= size:
                if hole == size:
                    del self._holes[index]
                else:
                    self._holes[index] = (offset + size, hole - size)
                return Slot(offset, size)
        return None

    def give(self, slot: Slot) -> None:
        """Take a slot back; each exactly once."""
        offset, size = slot.offset, slot.size
        index = bisect.bisect_left(self._holes, (offset, 0))
        if index < len(self._holes) and self._holes[index][0] == offset + size:
            size += self._holes.pop(index)[1]
        if index and sum(self._holes[index - 1]) == offset:
            offset, before = self._holes[index - 1][0], self._holes[index - 1][1]
            self._holes[index - 1] = (offset, before + size)
        else:
            self._holes.insert(index, (offset, size))
