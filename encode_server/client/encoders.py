"""The encoders of a pool: which of them are well, how busy they are, and which one is next."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from encode_server.client.affinity import by_affinity
from encode_server.client.errors import ClientError
from encode_server.client.http import EncodeClient

logger = logging.getLogger(__name__)

Choice = Literal["content", "least_loaded"]

PROBE_TIMEOUT_S = 3.0
SICK_PROBE_S = 0.5
MISSES = 2  # a machine that is short of CPU misses one now and then


class Encoder:
    """One encoder as the pool sees it. `in_flight` counts items; `not_before` is of `time.monotonic()`."""

    def __init__(self, client: EncodeClient) -> None:
        self.client = client
        self.url = client.base_url
        self.healthy = True  # until proven otherwise: the first request needn't wait for a probe
        self.not_before = 0.0
        self.in_flight = 0
        self.suspected = asyncio.Event()

    @contextlib.contextmanager
    def working(self, items: int) -> Iterator[None]:
        """Count `items` as in flight."""
        self.in_flight += items
        try:
            yield
        finally:
            self.in_flight -= items


class Encoders:
    """Chooses among encoders, and keeps asking each for its health. Used on one loop."""

    def __init__(self, clients: Sequence[EncodeClient], choice: Choice, probe_s: float) -> None:
        self.all = [Encoder(client) for client in clients]
        self._choice, self._probe_s = choice, probe_s
        self._changed = asyncio.Event()

    async def choose(self, key: bytes, avoid: Collection[Encoder]) -> Encoder:
        """The encoder for an item; waits while none takes requests. One of `avoid` only when no other is left."""
        while True:
            if (found := self.pick(key, avoid)) is not None:
                return found
            waits = [encoder.not_before - time.monotonic() for encoder in self.all if encoder.healthy]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.001, min(waits)) if waits else None):
                    await self._changed.wait()

    def pick(self, key: bytes, avoid: Collection[Encoder] = ()) -> Encoder | None:
        """The encoder for an item right now, None when all are sick or busy."""
        now = time.monotonic()
        ready = [encoder for encoder in self.all if encoder.healthy and encoder.not_before <= now]
        ready = [encoder for encoder in ready if encoder not in avoid] or ready
        if not ready:
            return None
        ordered = by_affinity(key, [(encoder.url, encoder) for encoder in ready])
        return ordered[0] if self._choice == "content" else min(ordered, key=lambda encoder: encoder.in_flight)

    def plan(self, keys: Sequence[bytes]) -> list[list[int]]:
        """The items, by index, in groups that go to one encoder each."""
        with contextlib.ExitStack() as planned:
            groups: dict[Encoder | None, list[int]] = {}
            for index, key in enumerate(keys):
                encoder = self.pick(key)
                if encoder is not None:
                    planned.enter_context(encoder.working(1))
                groups.setdefault(encoder, []).append(index)
        return list(groups.values())

    def busy(self, encoder: Encoder, seconds: float) -> None:
        """It asked not to be sent anything for so long."""
        encoder.not_before = max(encoder.not_before, time.monotonic() + seconds)

    def suspect(self, encoder: Encoder) -> None:
        """It failed: nothing is sent there until it says that it is well."""
        self._judge(encoder, False)
        encoder.suspected.set()

    async def watch(self) -> None:
        """Ask each encoder for its health, again and again, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for encoder in self.all:
                group.create_task(self._watch(encoder))

    async def _watch(self, encoder: Encoder) -> None:
        misses = 0
        while True:
            encoder.suspected.clear()
            misses = 0 if (well := await _says_well(encoder)) else misses + 1
            if not encoder.suspected.is_set() and (well or misses >= MISSES):  # a suspicion is newer than the answer
                self._judge(encoder, well)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SICK_PROBE_S if misses or not encoder.healthy else self._probe_s):
                    await encoder.suspected.wait()
            await asyncio.sleep(0.05)  # whatever fails how fast: no busy loop

    def _judge(self, encoder: Encoder, healthy: bool) -> None:
        if encoder.healthy == healthy:
            return
        encoder.healthy = healthy
        logger.log(logging.INFO if healthy else logging.WARNING, "%s is %s", encoder.url, "well" if healthy else "sick")
        self._changed.set()
        self._changed = asyncio.Event()


async def _says_well(encoder: Encoder) -> bool:
    with contextlib.suppress(ClientError, TimeoutError):
        return (await encoder.client.health(timeout=PROBE_TIMEOUT_S)).ok
    return False
