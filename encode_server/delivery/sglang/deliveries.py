"""SGLang's push: to the ports its request names (zmq_to_tokenizer), or to whoever registers (zmq_to_scheduler)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from typing import Protocol

from encode_server.delivery.base import Part
from encode_server.delivery.push import Pusher
from encode_server.delivery.sglang.frames import SGLangFrames, torch_values
from encode_server.delivery.sglang.registrations import (
    Accepts,
    Destinations,
    Landing,
    Offer,
    Registration,
    Registrations,
)
from encode_server.delivery.sglang.sizes import Size, Sizes
from encode_server.errors import DeadlineExceeded, DeliveryFailed, EncodeError
from encode_server.runtime.pools import Pace, run_sized
from encode_server.wire.embedding import Encoded, OutgoingRoom, embedding_bytes, releasing
from encode_server.wire.preparers import Pickled

TorchPickles = Callable[[str, list[list[int]] | None, list[float] | None], Awaitable[Pickled]]
"""Has the pickle programs of torch objects made by a process that has torch; see `Preparers.pickle`."""


class Mooncake(Protocol):
    """Whoever writes into other processes' memory; see `delivery.mooncake.MooncakeEngine`."""

    @property
    def room(self) -> OutgoingRoom | None:
        """Where embeddings had best lie."""

    async def write(self, session: str, address: int, data: memoryview) -> None:
        """Write all of `data` there. Raises DeliveryFailed."""


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
        mooncake: Mooncake | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        """`sizes`: where the embedding's size is told before the embedding exists."""
        self._pusher, self._frames, self._pickles, self._pool = pusher, frames, pickles, pool
        self._destinations, self._wait_s = destinations, wait_s
        self._mooncake, self._sizes = mooncake, sizes
        self._served: set[str] = set()  # endpoints that have the embedding

    @property
    def room(self) -> OutgoingRoom | None:
        """Where the embedding had best lie; None where no destination can offer its memory."""
        return self._mooncake.room if self._mooncake is not None and self._sizes is not None else None

    def announce(self, req_id: str, rows: int, dim: int, dtype: str) -> None:
        """The embedding will be [rows, dim] values of `dtype`."""
        if self._sizes is not None:
            self._sizes.tell(req_id, Size(rows, dim, embedding_bytes(rows, dim, dtype)))

    async def deliver(self, part: Part, encoded: Encoded) -> None:
        """See `Delivery`. Raises DeadlineExceeded when a destination does not come in time."""
        self.announce(part.req_id, *encoded.shape, encoded.dtype)
        header = self._frames.header(part, encoded, await self._pickles(*torch_values(encoded)))
        with releasing(await run_sized(self._pool, Pace.COPY, encoded.nbytes, encoded.contiguous, self.room)) as data:
            await self._serve_all(header, data)

    async def _serve_all(self, header: bytes, data: memoryview) -> None:
        pushes: list[asyncio.Task[None]] = []
        try:
            try:
                async with asyncio.timeout(self._wait_s):
                    async for endpoint in self._destinations.arrivals():
                        pushes.append(asyncio.create_task(self._serve(endpoint, header, data[:])))
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
        if self._sizes is not None:
            self._sizes.fail(part.req_id, error)
        frame = self._frames.error(part, error)
        for endpoint in self._destinations.endpoints:
            if endpoint in self._served:
                continue
            if (landing := self._destinations.landing(endpoint)) is not None:
                landing.end(error)
            else:
                self._pusher.notify(endpoint, [frame])

    async def _serve(self, endpoint: str, header: bytes, data: memoryview) -> None:
        with releasing(data):
            await self._send(endpoint, header, data)
        self._served.add(endpoint)

    async def _send(self, endpoint: str, header: bytes, data: memoryview) -> None:
        landing = self._destinations.landing(endpoint)
        if landing is None:
            await self._pusher.push(endpoint, [header, data])
            return
        if self._mooncake is None or landing.nbytes != data.nbytes:
            raise _told(landing, f"the embedding has {data.nbytes} bytes, room was made for {landing.nbytes}")
        if not landing.begin():
            raise DeliveryFailed("the destination has given its memory away")
        failure: EncodeError = DeliveryFailed("the transfer was interrupted")
        try:
            await self._mooncake.write(landing.session, landing.address, data)
            await self._pusher.push(endpoint, [header])
        except EncodeError as error:
            failure = error
            raise
        else:
            landing.written()
        finally:
            landing.written(failure)


def _told(landing: Landing, why: str) -> EncodeError:
    error = DeliveryFailed(why)
    landing.end(error)
    return error


class SGLangDeliveries:
    """Makes the deliveries of one server and takes the registrations of prefill ranks."""

    def __init__(
        self,
        pusher: Pusher,
        frames: SGLangFrames,
        pickles: TorchPickles,
        pool: Executor,
        wait_s: float,
        mooncake: Mooncake | None = None,
    ) -> None:
        """`mooncake`: None where no destination can offer its memory."""
        self._pusher, self._frames, self._pickles = pusher, frames, pickles
        self._pool, self._wait_s = pool, wait_s
        self.mooncake = mooncake
        self.registrations = Registrations()
        self.sizes = Sizes()

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
        with self.registrations.use(req_id, accepts) as destinations, self.sizes.part(req_id):
            yield self._push(destinations, self.sizes if self.mooncake is not None else None)

    def close(self) -> None:
        """Forget all registrations."""
        self.registrations.close()

    def _push(self, destinations: Destinations, sizes: Sizes | None = None) -> SGLangPush:
        return SGLangPush(
            self._pusher, self._frames, self._pickles, self._pool, destinations, self._wait_s, self.mooncake, sizes
        )
