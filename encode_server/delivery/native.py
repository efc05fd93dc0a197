"""Our own push: the frames of `wire.frames` to one PULL socket."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from encode_server.delivery.base import Part
from encode_server.delivery.push import Pusher
from encode_server.errors import DeliveryFailed, EncodeError
from encode_server.runtime.pools import Pace, run_sized
from encode_server.wire.embedding import Encoded, OutgoingRoom, releasing
from encode_server.wire.frames import MEMORY_VERSION, EmbeddingHeader, ErrorInfo, RemoteMemory, encode_header


class Nixl(Protocol):
    """Whoever offers memory to be read; see `delivery.nixl.NixlAgent`."""

    @property
    def room(self) -> OutgoingRoom:
        """Where embeddings must lie to be read."""

    def offer(self, data: memoryview) -> AbstractAsyncContextManager[tuple[RemoteMemory, asyncio.Future[None]]]:
        """Where the bytes, which lie in `room`, can be read while the context is open, and what ends when they have
        been."""


class NativePush:
    """Delivers to `endpoint` (`tcp://address:port`)."""

    def __init__(self, pusher: Pusher, endpoint: str, pool: Executor, nixl: Nixl | None = None) -> None:
        """`nixl`: None where every embedding follows its header; one that finds no room to be read from does, too."""
        self._pusher, self._endpoint, self._pool, self._nixl = pusher, endpoint, pool, nixl

    async def deliver(self, part: Part, encoded: Encoded) -> None:
        """See `Delivery`."""
        items = [item.info for item in encoded.items]
        header = _header(part, dtype=encoded.dtype, shape=encoded.shape, items=items)
        room = self._nixl.room if self._nixl is not None else None
        with releasing(await run_sized(self._pool, Pace.COPY, encoded.nbytes, encoded.contiguous, room)) as data:
            if self._nixl is not None and self._nixl.room.holds(data):
                await self._offer(self._nixl, header, data)
            else:
                await self._pusher.push(self._endpoint, [encode_header(header), data])

    async def _offer(self, nixl: Nixl, header: EmbeddingHeader, data: memoryview) -> None:
        async with nixl.offer(data) as (memory, taken):
            header.memory, header.version = memory, MEMORY_VERSION
            await self._pusher.push(self._endpoint, [encode_header(header)])
            await asyncio.wait((taken,), timeout=self._pusher.timeout_s)
            if not taken.done():
                raise DeliveryFailed("the destination did not read the embedding in time")
            taken.result()

    async def fail(self, part: Part, error: EncodeError) -> None:
        """See `Delivery`."""
        header = _header(part, error=ErrorInfo(error.status, error.code, error.message))
        self._pusher.notify(self._endpoint, [encode_header(header)])


def _header(part: Part, **outcome: Any) -> EmbeddingHeader:
    return EmbeddingHeader(
        req_id=part.req_id,
        model=part.model,
        modality=part.modality,
        part_idx=part.part_idx,
        num_parts=part.num_parts,
        **outcome,
    )
