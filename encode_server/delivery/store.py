"""Delivery into a directory that vLLM's encoder-cache connector reads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import msgspec

from encode_server.delivery.base import Part
from encode_server.delivery.folder import EntryFolder, check_identifier
from encode_server.errors import BadRequest, Duplicate, EncodeError
from encode_server.runtime.pools import Pace, run, run_sized, run_to_end
from encode_server.wire.embedding import Encoded, EncodedItem, Wanted, embedding_bytes
from encode_server.wire.frames import ItemInfo
from encode_server.wire.tensorfile import tensor_head

log = logging.getLogger(__name__)

TENSOR = "ec_cache"
MAX_ABOUT = 16 << 10  # bytes; a head must stay within what readers of heads read


class EmbeddingStore:
    """Owner of the directory: clears it of what a crash left, removes what is old while the server lives."""

    def __init__(self, folder: EntryFolder, max_age_s: float, pool: Executor, setting: str = "") -> None:
        """`setting`: of this server, what its embeddings depend on beside what a request says."""
        self._folder, self._pool, self._setting = folder, pool, setting
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
        return StoreDelivery(self._folder, named, self._pool, self._setting)


class StoreDelivery:
    """Writes each item's embedding as the tensor `ec_cache` [tokens, dim] under the item's identifier."""

    def __init__(self, folder: EntryFolder, identifiers: Sequence[str], pool: Executor, setting: str) -> None:
        self._folder, self._identifiers, self._pool, self._setting = folder, identifiers, pool, setting

    async def deliver(self, part: Part, encoded: Encoded) -> None:
        """See `Delivery`. Also raises StoreFull, and Duplicate for the name of other media."""
        for identifier, item in zip(self._identifiers, encoded.items, strict=True):
            await run_to_end(self._pool, self._write, identifier, item, encoded)

    async def recall(self, wanted: Wanted, expect: Callable[[int], None]) -> EncodedItem | None:
        """An item that the store has, of the same media, encoded in the same way: the item is not encoded again.
        `expect`: told of the embedding's bytes before they are read."""
        identifier = wanted.uuid or ""
        if identifier not in self._identifiers:
            return None
        there = await run(self._pool, self._folder.metadata, identifier)
        if any(there.get(name) != value for name, value in _way(wanted, self._setting).items()):
            return None
        try:
            info = msgspec.json.decode(there["item"], type=ItemInfo)
            extra = msgspec.json.decode(there["extra"], type=dict[str, float | int | list[float]])
        except (KeyError, ValueError):
            return None
        if info.content_hash != wanted.digest:
            return None
        nbytes = embedding_bytes(info.tokens, wanted.dim, wanted.dtype)
        expect(nbytes)
        data = await run_sized(self._pool, Pace.COPY, nbytes, self._folder.content, identifier, nbytes)
        if data is None:
            return None
        return EncodedItem(msgspec.structs.replace(info, cached=True), extra, memoryview(data), wanted.options)

    async def fail(self, part: Part, error: EncodeError) -> None:
        """Nobody is told: a consumer finds no entry, and encodes by itself."""

    def _write(self, identifier: str, item: EncodedItem, encoded: Encoded) -> None:
        shape = (item.info.tokens, encoded.dim)
        metadata = {"model": encoded.model, "modality": str(encoded.modality), "content_hash": item.info.content_hash}
        about = _about(encoded, item, self._setting)
        there = self._folder.metadata(identifier)
        other = any(there.get(key) != metadata[key] for key in ("modality", "content_hash"))
        if there.get("model") == encoded.model and other:
            # Whoever can guess a uuid could put an embedding in the place of another's.
            raise Duplicate(f"uuid {identifier!r} is the name of other media in the store")
        head = tensor_head(TENSOR, encoded.dtype, shape, item.data.nbytes, metadata | about)
        self._folder.write(identifier, [head, item.data])


def _way(wanted: Wanted, setting: str) -> dict[str, str]:
    """What an embedding depends on beside the media."""
    return {
        "model": wanted.model,
        "modality": str(wanted.modality),
        "dtype": wanted.dtype,
        "dim": str(wanted.dim),
        "options": msgspec.json.encode(wanted.options).decode(),
        "setting": setting,
    }


def _about(encoded: Encoded, item: EncodedItem, setting: str) -> dict[str, str]:
    """What lets a later request for the same item be served from the store; nothing where that is long."""
    if item.options is None:
        return {}
    about = {
        "dtype": encoded.dtype,
        "dim": str(encoded.dim),
        "options": msgspec.json.encode(item.options).decode(),
        "setting": setting,
        "item": msgspec.json.encode(msgspec.structs.replace(item.info, cached=False)).decode(),
        "extra": msgspec.json.encode(item.extra).decode(),
    }
    return about if sum(map(len, about.values())) < MAX_ABOUT else {}
