"""Who asked for which part: destinations that register before, while or after the part is encoded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from encode_server.errors import BadRequest

EARLY_S = 180.0  # how long a destination may be there before its /encode is
MAX_EARLY = 16384


class Registration:
    """The destinations of one req_id: `wanted` of them, None until the first says how many."""

    def __init__(self) -> None:
        self.wanted: int | None = None
        self.endpoints: list[str] = []
        self.users = 0  # parts in work that go to them
        self.expiry: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

    def add(self, endpoint: str, wanted: int) -> None:
        """Add a destination; the same one again changes nothing.

        Raises BadRequest when the number wanted changes or is exceeded.
        """
        if self.wanted not in (None, wanted):
            raise BadRequest(f"receive_count is {wanted}, an earlier registration of this req_id said {self.wanted}")
        if endpoint in self.endpoints:
            return
        if len(self.endpoints) >= wanted:
            raise BadRequest(f"receive_count is {wanted}, and as many other destinations are registered already")
        self.wanted = wanted
        self.endpoints.append(endpoint)
        self._changed.set()
        self._changed = asyncio.Event()

    async def arrivals(self) -> AsyncIterator[str]:
        """Each destination once, as they come, until all that are wanted came."""
        given = 0
        while self.wanted is None or given < self.wanted:
            if given == len(self.endpoints):
                await self._changed.wait()
                continue
            yield self.endpoints[given]
            given += 1


class Registrations:
    """All registrations. One that no part in work uses is forgotten after `early_s` seconds, the oldest first where
    there are more than `max_early`."""

    def __init__(self, early_s: float = EARLY_S, max_early: int = MAX_EARLY) -> None:
        self._early_s, self._max_early = early_s, max_early
        self._used: dict[str, Registration] = {}
        self._early: dict[str, Registration] = {}

    def __len__(self) -> int:
        return len(self._used) + len(self._early)

    def register(self, req_id: str, endpoint: str, wanted: int) -> None:
        """Note that `endpoint` wants this part, `wanted` destinations in all. Raises BadRequest, see `Registration`."""
        registration = self._used.get(req_id) or self._early.get(req_id)
        if registration is None:
            registration = self._early[req_id] = Registration()
            loop = asyncio.get_running_loop()
            registration.expiry = loop.call_later(self._early_s, self._drop, req_id)
            if len(self._early) > self._max_early:
                self._drop(next(iter(self._early)))
        registration.add(endpoint, wanted)

    @contextlib.contextmanager
    def use(self, req_id: str) -> Iterator[Registration]:
        """The registration of a part while it is in work; forgotten afterwards, with what came for it."""
        registration = self._used.get(req_id) or self._drop(req_id) or Registration()
        self._used[req_id] = registration
        registration.users += 1
        try:
            yield registration
        finally:
            registration.users -= 1
            if not registration.users:
                del self._used[req_id]

    def close(self) -> None:
        """Forget everything."""
        for req_id in list(self._early):
            self._drop(req_id)

    def _drop(self, req_id: str) -> Registration | None:
        registration = self._early.pop(req_id, None)
        if registration is not None and registration.expiry is not None:
            registration.expiry.cancel()
        return registration
