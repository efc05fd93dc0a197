"""Work of strangers that takes turns: one piece for each turn of the event loop, however many pieces are ready."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """A hundred tasks that are ready together would all run before anything else does, again and again: a request that
    needs twenty turns of the loop would wait two thousand pieces of theirs. With these turns it waits twenty."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return when it is the caller's turn, first come, first served."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            loop.call_soon(self._next)
        await turn

    def _next(self) -> None:
        while self._waiting:
            turn = self._waiting[0]
            if turn.done():  # cancelled
                self._waiting.popleft()
                continue
            turn.set_result(None)
            self._waiting.popleft()
            break
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._next)
