"""Places that clients compete for, shared fairly."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Waiter:
    client: str
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class FairSlots:
    """`total` places; one client has at most `share` of them (above 0, up to 1), however idle the others are: what it
    holds for long would keep out whoever comes next. A free place goes to the waiting client that holds fewest."""

    def __init__(self, total: int, share: float = 1.0) -> None:
        self._free = total
        self._each = max(1, int(total * share))
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, list[_Waiter]] = {}

    @contextlib.asynccontextmanager
    async def hold(self, client: str) -> AsyncIterator[None]:
        """Have a place."""
        await self.acquire(client)
        try:
            yield
        finally:
            self.release(client)

    async def acquire(self, client: str) -> None:
        """Take a place, and wait for it where need be. Cancelled, it takes none."""
        waiter = _Waiter(client)
        self._waiting.setdefault(client, []).append(waiter)
        self._grant()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled():
                self.release(client)
            else:
                self._forget(waiter)
            raise

    def release(self, client: str) -> None:
        """Give a place back."""
        self._free += 1
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._grant()

    def _grant(self) -> None:
        while self._free:
            may = [client for client in self._waiting if self._held[client] < self._each]
            if not may:
                return
            waiter = self._waiting[min(may, key=lambda client: self._held[client])][0]
            self._forget(waiter)
            self._free -= 1
            self._held[waiter.client] += 1
            waiter.granted.set_result(None)

    def _forget(self, waiter: _Waiter) -> None:
        mine = self._waiting.get(waiter.client, [])
        if waiter in mine:
            mine.remove(waiter)
        if not mine:
            self._waiting.pop(waiter.client, None)
