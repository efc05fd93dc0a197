"""Our own push: the frames of `wire.frames` to one PULL socket."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

from encode_server.delivery.base import Part
from encode_server.delivery.push import Pusher
from encode_server.errors import EncodeError
from encode_server.runtime.pools import Pace, run_sized
from encode_server.wire.embedding import Encoded
from encode_server.wire.frames import EmbeddingHeader, ErrorInfo, encode_header


class NativePush:
    """Delivers to `endpoint` (`tcp://address:port`)."""

    def __init__(self, pusher: Pusher, endpoint: str, pool: Executor) -> None:
        self._pusher, self._endpoint, self._pool = pusher, endpoint, pool

    async def deliver(self, part: Part, encoded: Encoded) -> None:
        """See `Delivery`."""
        items = [item.info for item in encoded.items]
        header = _header(part, dtype=encoded.dtype, shape=encoded.shape, items=items)
        data = await run_sized(self._pool, Pace.COPY, encoded.nbytes, encoded.contiguous)
        await self._pusher.push(self._endpoint, [encode_header(header), data])

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
