"""Tell any number of waiters that something has changed."""

from __future__ import annotations

import asyncio


class Changes:
    """`wait` returns at the next `announce` after its call."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def announce(self) -> None:
        """Wake everybody who waits now."""
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self) -> None:
        """Return at the next change."""
        await self._next.wait()
