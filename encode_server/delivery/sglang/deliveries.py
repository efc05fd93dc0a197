"""SGLang's push: to the ports its request names (zmq_to_tokenizer), or to whoever registers (zmq_to_scheduler)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor

from encode_server.delivery.base import Part
from encode_server.delivery.push import Pusher
from encode_server.delivery.sglang.frames import SGLangFrames, torch_values
from encode_server.delivery.sglang.registrations import Accepts, Destinations, Offer, Registration, Registrations
from encode_server.errors import DeadlineExceeded, EncodeError
from encode_server.runtime.pools import Pace, run_sized
from encode_server.wire.embedding import Encoded
from encode_server.wire.preparers import Pickled

TorchPickles = Callable[[str, list[list[int]] | None, list[float] | None], Awaitable[Pickled]]
"""Has the pickle programs of torch objects made by a process that has torch; see `Preparers.pickle`."""


class SGLangPush:
    """Delivers one part to every one of `destinations`, each as soon as it is there."""

    def __init__(
        self,
        pusher: Pusher,
        frames: SGLangFrames,
        pickles: TorchPickles,
        pool: Executor,
        destinations: Destinations,
        wait_s: float,
    ) -> None:
        self._pusher, self._frames, self._pickles, self._pool = pusher, frames, pickles, pool
        self._destinations, self._wait_s = destinations, wait_s
        self._served: set[str] = set()  # endpoints that have the embedding

    async def deliver(self, part: Part, encoded: Encoded) -> None:
        """See `Delivery`. Raises DeadlineExceeded when a destination does not come in time."""
        header = self._frames.header(part, encoded, await self._pickles(*torch_values(encoded)))
        data = await run_sized(self._pool, Pace.COPY, encoded.nbytes, encoded.contiguous)
        pushes: list[asyncio.Task[None]] = []
        try:
            try:
                async with asyncio.timeout(self._wait_s):
                    async for endpoint in self._destinations.arrivals():
                        pushes.append(asyncio.create_task(self._push(endpoint, [header, data])))
            except TimeoutError:
                wanted = self._destinations.wanted
                came = f"{len(pushes)} of {wanted} destinations" if wanted else "no destination"
                raise DeadlineExceeded(f"{came} came for the embedding within {self._wait_s:g} s") from None
            # All are waited for: one that fails takes nothing from the others.
            for outcome in await asyncio.gather(*pushes, return_exceptions=True):
                if outcome is not None:
                    raise outcome
        finally:
            for push in pushes:
                push.cancel()

    async def fail(self, part: Part, error: EncodeError) -> None:
        """See `Delivery`. Endpoints that have the embedding are not told: an error would still end their request."""
        frame = self._frames.error(part, error)
        for endpoint in self._destinations.endpoints:
            if endpoint not in self._served:
                self._pusher.notify(endpoint, [frame])

    async def _push(self, endpoint: str, frames: list[bytes | memoryview]) -> None:
        await self._pusher.push(endpoint, frames)
        self._served.add(endpoint)


class SGLangDeliveries:
    """Makes the deliveries of one server and takes the registrations of prefill ranks."""

    def __init__(
        self, pusher: Pusher, frames: SGLangFrames, pickles: TorchPickles, pool: Executor, wait_s: float
    ) -> None:
        self._pusher, self._frames, self._pickles = pusher, frames, pickles
        self._pool, self._wait_s = pool, wait_s
        self.registrations = Registrations()

    def to_endpoints(self, endpoints: list[str]) -> SGLangPush:
        """To each of the endpoints."""
        registration = Registration()
        endpoints = list(dict.fromkeys(endpoints))
        for endpoint in endpoints:
            registration.add(Offer(endpoint, ""), len(endpoints))
        return self._push(Destinations(registration))

    @contextlib.contextmanager
    def to_registered(self, req_id: str, accepts: Accepts) -> Iterator[SGLangPush]:
        """To those who register for `req_id`, before or while the context is open, and are accepted."""
        with self.registrations.use(req_id, accepts) as destinations:
            yield self._push(destinations)

    def close(self) -> None:
        """Forget all registrations."""
        self.registrations.close()

    def _push(self, destinations: Destinations) -> SGLangPush:
        return SGLangPush(self._pusher, self._frames, self._pickles, self._pool, destinations, self._wait_s)
