"""The embedding cache: content-addressed, bounded in bytes, least recently used out first, one encode per content.

The key is made of what this server computed itself: the SHA-256 of the media's bytes, the modality, and the options
that change the result. The model, its revision and dtype are fixed for a server's life, and the cache lives no longer.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from encode_server.errors import EncodeError, EncodeFailed
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.embedding import EncodedItem
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality

ENTRY_OVERHEAD = 1024  # bytes counted for an entry beside its embedding


@dataclass(frozen=True)
class CacheKey:
    """What an embedding depends on. `digest`: `sha256:<hex>` of the media's bytes, computed by this server."""

    modality: Modality
    digest: str
    options: ItemOptions


class EmbeddingCache:
    """Holds up to `max_bytes` of embeddings; with 0 it holds none, and identical items still share one encode."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self.max_bytes, self._metrics = max_bytes, metrics
        self._entries: OrderedDict[CacheKey, EncodedItem] = OrderedDict()
        self._flights: dict[CacheKey, asyncio.Future[EncodedItem]] = {}
        self.bytes = 0

    async def get(self, key: CacheKey, compute: Callable[[], Awaitable[EncodedItem]]) -> tuple[EncodedItem, bool]:
        """The embedding for `key`, and whether it was there or on its way already.

        One caller computes, the others wait for it. When that one fails for a reason of its own (cancelled, out of
        time, ranks lost), a waiting one computes in its place. An error of the media itself is everybody's, and so is
        that of a forward which failed on it alone: to try it again for each could cost the ranks each time.
        """
        while True:
            if (entry := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
                self._metrics.cache["hit"].inc()
                return entry, True
            if (flight := self._flights.get(key)) is None:
                self._metrics.cache["miss"].inc()
                return await self._lead(key, compute), False
            await asyncio.wait((flight,))
            if flight.cancelled():
                continue
            error = flight.exception()
            if error is None:
                self._metrics.cache["shared"].inc()
                return flight.result(), True
            if isinstance(error, EncodeFailed) or (
                isinstance(error, EncodeError) and error.status < 500 and error.status != 429
            ):
                raise type(error)(error.message, headers=error.headers)

    async def find(self, key: CacheKey) -> EncodedItem | None:
        """The embedding for `key` if it is there or on its way, else None. Another's failure is None as well."""
        if (flight := self._flights.get(key)) is not None:
            await asyncio.wait((flight,))
            if not flight.cancelled() and flight.exception() is None:
                self._metrics.cache["shared"].inc()
                return flight.result()
        if (entry := self._entries.get(key)) is not None:
            self._entries.move_to_end(key)
            self._metrics.cache["hit"].inc()
        return entry

    async def _lead(self, key: CacheKey, compute: Callable[[], Awaitable[EncodedItem]]) -> EncodedItem:
        flight: asyncio.Future[EncodedItem] = asyncio.get_running_loop().create_future()
        self._flights[key] = flight
        try:
            item = await compute()
        except asyncio.CancelledError:
            flight.cancel()
            raise
        except BaseException as error:
            flight.set_exception(error)
            flight.exception()  # nobody may be waiting
            raise
        else:
            flight.set_result(item)
            self.keep(key, item)
            return item
        finally:
            del self._flights[key]
            del flight  # the error's traceback has this frame, and the flight has the error: a cycle

    def keeps(self, nbytes: int) -> bool:
        """Whether an embedding of so many bytes would be kept."""
        return nbytes + ENTRY_OVERHEAD <= self.max_bytes

    def keep(self, key: CacheKey, item: EncodedItem) -> None:
        """Keep an embedding that has been found elsewhere, if there is room for one of its size."""
        size = item.data.nbytes + ENTRY_OVERHEAD
        if not self.keeps(item.data.nbytes) or key in self._entries:
            return
        self._entries[key] = item
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.data.nbytes + ENTRY_OVERHEAD
