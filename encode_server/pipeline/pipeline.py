"""A request's way from its media to its embedding: fetch, preprocess, copy in, forward."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import msgspec

from encode_server.engine.arena import Arena
from encode_server.engine.group import GroupLost
from encode_server.engine.supervisor import Supervisor
from encode_server.errors import BadRequest, EncodeError, NotReady, TooLarge, UnsupportedModality
from encode_server.media.sources import MediaSource
from encode_server.pipeline.batcher import Batcher
from encode_server.pipeline.cache import CacheKey, EmbeddingCache
from encode_server.pipeline.request import EncodeRequest, MediaItem
from encode_server.pipeline.work import Placement, room_for
from encode_server.runtime.pools import Pools, copy, run
from encode_server.telemetry.cpu import CpuClock, counted
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.embedding import Encoded, EncodedItem
from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import EncoderInfo

if TYPE_CHECKING:
    from encode_server.models.prepared import Prepared
    from encode_server.models.preprocess import Preprocessor
    from encode_server.wire.items import ItemOptions

P = ParamSpec("P")
T = TypeVar("T")

LONG_MEDIA = 8 << 20  # bytes from which an item counts as a long job
SMALL_MEDIA = 64 << 10  # bytes hashed on the loop, in less time than a change of threads


class Pipeline:
    """Turns requests into embeddings. Everything slow happens in the pools or the ranks, never on the loop."""

    def __init__(
        self,
        *,
        model: str,
        preprocessor: Preprocessor,
        source: MediaSource,
        pools: Pools,
        arena: Arena,
        engine: Supervisor,
        batcher: Batcher,
        cache: EmbeddingCache,
        max_item_tokens: int,
        metrics: Metrics,
    ) -> None:
        self._model, self._preprocessor, self._source, self._pools = model, preprocessor, source, pools
        self._max_item_tokens = max_item_tokens
        self._long_jobs = asyncio.Semaphore(max(1, pools.preproc_workers * 3 // 4))
        self._arena, self._engine, self._batcher, self._cache, self._metrics = arena, engine, batcher, cache, metrics

    @property
    def modalities(self) -> frozenset[Modality]:
        """What the model encodes."""
        return self._preprocessor.modalities

    async def encode(self, request: EncodeRequest) -> Encoded:
        """The embedding of a request. Its arena slots are free afterwards, however it ends.

        Raises EncodeError; one about an item names it. Cancellation ends what has not started.
        """
        if request.modality not in self.modalities:
            has = ", ".join(sorted(self.modalities))
            raise UnsupportedModality(f"this model has no encoder for {request.modality}, it takes: {has}")
        info = await self._ready()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._encode_item(request, index, item))
                    for index, item in enumerate(request.items)
                ]
        except* EncodeError as errors:
            raise _first(errors) from None
        items = [task.result() for task in tasks]
        return Encoded(request.modality, self._model, info.dtype, info.dims[request.modality], items)

    async def _encode_item(self, request: EncodeRequest, index: int, item: MediaItem) -> EncodedItem:
        try:
            return await self._through(request, item)
        except EncodeError as error:
            raise (error.about_item(index) if error.status < 500 else error) from None

    async def _through(self, request: EncodeRequest, item: MediaItem) -> EncodedItem:
        clock = _StageClock(request, self._metrics)
        if isinstance(item.source, bytes):
            data = item.source
        else:
            data = await self._source.fetch(item.source)
            request.weigh(nbytes=max(0, len(data) - len(item.source)))
        clock.lap("fetch")
        pool = self._pools.urgent if request.urgent else self._pools.preproc
        digest = _digest(data) if len(data) <= SMALL_MEDIA else await run(pool, _digest, data)
        if item.content_hash is not None and item.content_hash.lower() != digest:
            raise BadRequest(f"content_hash is {item.content_hash!r}, the media's is {digest!r}")
        if request.urgent:
            return await self._compute(request, item, data, digest)

        key = CacheKey(request.modality, digest, item.options)
        kept, cached = await self._cache.get(key, lambda: self._compute(request, item, data, digest))
        return replace(kept, info=msgspec.structs.replace(kept.info, cached=cached))

    async def _compute(self, request: EncodeRequest, item: MediaItem, data: bytes, digest: str) -> EncodedItem:
        """Preprocess and forward one item."""
        clock = _StageClock(request, self._metrics)
        prepared = await self._prepare(request, item, data)
        clock.lap("preprocess")
        placement = await self._place(request, prepared)
        clock.lap("copy")
        try:
            self._batcher.submit(placement)
            await placement.finished
            # To the heap at once: a slow or late destination must not hold room that the next batch needs.
            pool = self._pools.urgent if request.urgent else self._pools.send
            embedding = await copy(pool, placement.nbytes, self._copying(placement.copy_embedding))
        finally:
            placement.release()
        clock.note("queue", placement.queue_s)
        clock.note("forward", placement.forward_s)
        grid = list(prepared.grid_thw) if prepared.grid_thw else None
        return EncodedItem(ItemInfo(prepared.tokens, grid, digest), prepared.extra, embedding)

    async def _prepare(self, request: EncodeRequest, item: MediaItem, data: bytes) -> Prepared:
        """Decode and preprocess. Long jobs never take all threads, so that a picture need not wait for a film."""
        arguments = (request.modality, data, item.options)
        if request.urgent:
            return await run(self._pools.urgent, self._preprocessor.prepare, *arguments)
        long = request.modality is Modality.VIDEO or len(data) > LONG_MEDIA
        async with self._long_jobs if long else contextlib.nullcontext():
            prepared = await run(self._pools.preproc, self._prepare_counted, *arguments)
        self._metrics.preprocessed.labels(request.modality).inc()
        if prepared.cost > self._max_item_tokens:
            raise TooLarge(f"it has {prepared.cost} patches or frames, at most {self._max_item_tokens} are encoded")
        request.weigh(tokens=prepared.cost)
        return prepared

    def _prepare_counted(self, modality: Modality, data: bytes, options: ItemOptions) -> Prepared:
        with CpuClock(self._metrics, "preprocess") as cpu:
            return self._preprocessor.prepare(modality, data, options, lambda: cpu.lap("decode"))

    def _copying(self, function: Callable[P, T]) -> Callable[P, T]:
        return counted(self._metrics, "copy", function)

    async def _ready(self) -> EncoderInfo:
        try:
            return await self._engine.wait_ready()
        except GroupLost as lost:
            raise NotReady(f"the encoder is not available: {lost}") from None

    async def _place(self, request: EncodeRequest, prepared: Prepared) -> Placement:
        """Reserve room for the item's tensors and its embedding, and copy the tensors in."""
        info = await self._ready()
        dim = info.dims[request.modality]
        pieces = self._preprocessor.split(prepared, self._batcher.budget(request.modality))
        room = room_for(pieces, dim, info.dtype)
        slots = await self._arena.acquire(room, urgent=request.urgent)
        placement = Placement(
            self._arena, request.modality, request.deadline, slots, client=request.client, urgent=request.urgent
        )
        try:
            pool = self._pools.urgent if request.urgent else self._pools.preproc
            await copy(pool, room[0], self._copying(placement.fill), pieces, dim, info.dtype)
        except BaseException:
            placement.release()
            raise
        return placement


class _StageClock:
    def __init__(self, request: EncodeRequest, metrics: Metrics) -> None:
        self._request, self._metrics, self._last = request, metrics, time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.note(stage, now - self._last)
        self._last = now

    def note(self, stage: str, seconds: float) -> None:
        self._request.spent(stage, seconds)
        if not self._request.urgent:
            self._metrics.stage.labels(stage).observe(seconds)


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _first(errors: BaseExceptionGroup[EncodeError]) -> EncodeError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, EncodeError)
    return error
