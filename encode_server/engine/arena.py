"""The shared-memory arena: preprocessed tensors on their way to the ranks, embeddings on their way back.

One anonymous memfd, mapped by the front, the preparers and the ranks: nothing to leak under /dev/shm, and no 64 MB
limit of a container's /dev/shm. Only the front allocates, on its event loop; the other processes are told offsets.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections import deque
from collections.abc import Sequence

from encode_server.engine.region import Region, Slot
from encode_server.errors import TooLarge
from encode_server.wire.layout import ALIGNMENT, aligned


class Arena:
    """The front's side of the arena. `reserve` bytes at the end are kept for health probes."""

    def __init__(self, size: int, reserve: int = 4 << 20) -> None:
        self.size = size + reserve
        self.fd = os.memfd_create("encode-server-arena")
        os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size)
        self._main = Region(0, size)
        self._reserve = Region(size, reserve)
        self._waiters: deque[tuple[asyncio.Future[list[Slot]], list[int]]] = deque()
        self.used = 0

    async def acquire(self, sizes: Sequence[int], *, reserved: bool = False) -> list[Slot]:
        """Slots of at least `sizes` bytes, all of them or none, granted in the order of asking. `reserved`: from the
        part that is kept for health probes, where that has room.

        Raises TooLarge immediately when they could never fit.
        """
        rounded = [max(ALIGNMENT, aligned(size)) for size in sizes]
        if sum(rounded) > self._main.size:
            raise TooLarge(
                f"needs {sum(rounded) >> 20} MiB of working memory, this server has {self._main.size >> 20} MiB"
            )
        if reserved and (slots := self._grant(self._reserve, rounded)):
            return slots
        if not self._waiters and (slots := self._grant(self._main, rounded)):
            return slots
        waiter: asyncio.Future[list[Slot]] = asyncio.get_running_loop().create_future()
        entry = (waiter, rounded)
        self._waiters.append(entry)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release(*waiter.result())
            elif entry in self._waiters:
                self._waiters.remove(entry)
                self._serve_waiters()
            raise

    def release(self, *slots: Slot) -> None:
        """Give slots back; each exactly once."""
        for slot in slots:
            (self._main if slot.offset < self._main.size else self._reserve).give(slot)
            self.used -= slot.size
        self._serve_waiters()

    def view(self, offset: int, size: int) -> memoryview:
        """The bytes [offset, offset + size), writable, not copied."""
        return memoryview(self._map)[offset : offset + size]

    def close(self) -> None:
        """Unmap and close. Views still held keep the mapping alive until they go."""
        try:
            self._map.close()
        except BufferError:
            pass
        os.close(self.fd)

    def _serve_waiters(self) -> None:
        # Strictly in order: letting small requests overtake would starve a large one forever.
        while self._waiters:
            waiter, sizes = self._waiters[0]
            if not waiter.done():
                slots = self._grant(self._main, sizes)
                if slots is None:
                    return
                waiter.set_result(slots)
            self._waiters.popleft()

    def _grant(self, region: Region, sizes: Sequence[int]) -> list[Slot] | None:
        slots: list[Slot] = []
        for size in sizes:
            slot = region.take(size)
            if slot is None:
                for taken in slots:
                    region.give(taken)
                return None
            slots.append(slot)
        self.used += sum(sizes)
        return slots
