"""Work of strangers that takes turns: one piece for each turn of the event loop, however many pieces are ready."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from encode_server.runtime.charge import Charge

REST = 2.0  # seconds of rest for each second of work: so much of a core stays with ranks and preparers
FREE_BYTES = 1 << 20  # of a body, that arrive without waiting for a turn
LEAST_REST_S = 0.002  # shorter ones add up until they are worth a timer


class Turns:
    """A hundred tasks that are ready together would all run before anything else does, again and again: a request that
    needs twenty turns of the loop would wait two thousand pieces of theirs. With these turns it waits twenty.

    While several tasks wait, the turns take no more than a third of the loop's time: what fills a core for a second
    would double the time of every forward beside it.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._began: float | None = None  # when the last turn was given, while others wait
        self._due_s = 0.0  # rest that has not been taken

    @property
    def idle(self) -> bool:
        """Nobody waits."""
        return all(turn.done() for turn in self._waiting)  # those that are done were cancelled

    async def wait(self) -> None:
        """Return when it is the caller's turn, first come, first served."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            loop.call_soon(self._next)
        await turn

    def _next(self) -> None:
        now = time.perf_counter()
        loop = asyncio.get_running_loop()
        if self._began is not None:
            self._due_s += REST * (now - self._began)
            self._began = None
            if self._due_s >= LEAST_REST_S:
                rest, self._due_s = self._due_s, 0.0
                loop.call_later(rest, self._next)
                return
        while self._waiting:
            turn = self._waiting[0]
            if turn.done():  # cancelled
                self._waiting.popleft()
                continue
            turn.set_result(None)
            self._waiting.popleft()
            break
        if self._waiting:
            self._began = now
            loop.call_soon(self._next)


class ClientTurns:
    """Turns for the bodies of requests, each client's own, while other clients have requests in progress, too. Whoever
    has little to do finds the loop free; several clients with much to do still use all of it."""

    def __init__(self, clients: Callable[[], int]) -> None:
        """`clients`: how many have requests in progress."""
        self._clients = clients
        self._turns: dict[str, Turns] = {}

    async def wait(self, client: str) -> None:
        """Return when it is the turn of this task of the client's."""
        if self._clients() < 2:
            return
        turns = self._turns.setdefault(client, Turns())
        try:
            await turns.wait()
        finally:
            if turns.idle and self._turns.get(client) is turns:
                del self._turns[client]

    def charging(self, client: str, charge: Charge) -> Charge:
        """`charge` for one body of the client's, whose pieces wait for their turns beyond `FREE_BYTES`."""
        arrived = 0

        async def charged(nbytes: int) -> None:
            nonlocal arrived
            await charge(nbytes)
            arrived += nbytes
            if arrived > FREE_BYTES:
                await self.wait(client)

        return charged
