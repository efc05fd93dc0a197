"""Delivery into a directory that vLLM's encoder-cache connector reads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from encode_server.delivery.base import Part
from encode_server.delivery.folder import EntryFolder, check_identifier
from encode_server.errors import BadRequest, Duplicate, EncodeError
from encode_server.runtime.pools import run, run_to_end
from encode_server.wire.embedding import Encoded, EncodedItem
from encode_server.wire.tensorfile import tensor_head

log = logging.getLogger(__name__)

TENSOR = "ec_cache"


class EmbeddingStore:
    """Owner of the directory: clears it of what a crash left, removes what is old while the server lives."""

    def __init__(self, folder: EntryFolder, max_age_s: float, pool: Executor) -> None:
        self._folder, self._pool = folder, pool
        self._pause_s = min(60.0, max_age_s / 10)

    async def run(self) -> None:
        """Sweep once, then expire until cancelled."""
        await self._clear(self._folder.sweep, "unfinished")
        while True:
            await self._clear(self._folder.expire, "old")
            await asyncio.sleep(self._pause_s)

    async def _clear(self, clear: Callable[[], int], kind: str) -> None:
        try:
            if gone := await run(self._pool, clear):
                log.info("removed %d %s entries of the embedding store", gone, kind)
        except OSError as error:
            log.error("the embedding store cannot be read: %s", error)

    def delivery(self, identifiers: Sequence[str | None]) -> StoreDelivery:
        """Delivery of a request whose items have these identifiers. Raises BadRequest when one is missing or unsafe."""
        named: list[str] = []
        for index, identifier in enumerate(identifiers):
            if identifier is None:
                raise BadRequest("uuid is missing: delivery ec_store needs one for each item").about_item(index)
            try:
                check_identifier(identifier)
            except BadRequest as error:
                raise error.about_item(index) from None
            named.append(identifier)
        return StoreDelivery(self._folder, named, self._pool)


class StoreDelivery:
    """Writes each item's embedding as the tensor `ec_cache` [tokens, dim] under the item's identifier."""

    def __init__(self, folder: EntryFolder, identifiers: Sequence[str], pool: Executor) -> None:
        self._folder, self._identifiers, self._pool = folder, identifiers, pool

    async def deliver(self, part: Part, encoded: Encoded) -> None:
        """See `Delivery`. Also raises StoreFull, and Duplicate for the name of other media."""
        for identifier, item in zip(self._identifiers, encoded.items, strict=True):
            await run_to_end(self._pool, self._write, identifier, item, encoded)

    async def fail(self, part: Part, error: EncodeError) -> None:
        """Nobody is told: a consumer finds no entry, and encodes by itself."""

    def _write(self, identifier: str, item: EncodedItem, encoded: Encoded) -> None:
        shape = (item.info.tokens, encoded.dim)
        metadata = {"model": encoded.model, "modality": str(encoded.modality), "content_hash": item.info.content_hash}
        there = self._folder.metadata(identifier)
        other = any(there.get(key) != metadata[key] for key in ("modality", "content_hash"))
        if there.get("model") == encoded.model and other:
            # Whoever can guess a uuid could put an embedding in the place of another's.
            raise Duplicate(f"uuid {identifier!r} is the name of other media in the store")
        head = tensor_head(TENSOR, encoded.dtype, shape, item.data.nbytes, metadata)
        self._folder.write(identifier, [head, item.data])
