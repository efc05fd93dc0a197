"""A request's way from its media to its embedding: fetch, cache, prepare, forward."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec

from encode_server.engine.arena import Arena
from encode_server.errors import BadRequest, EncodeError, TooLarge, UnsupportedModality, first_of
from encode_server.media.sources import MediaSource
from encode_server.pipeline.batcher import Batcher
from encode_server.pipeline.cache import CacheKey, EmbeddingCache
from encode_server.pipeline.jobs import Job
from encode_server.pipeline.pooling import pooled
from encode_server.pipeline.request import EncodeRequest, MediaItem
from encode_server.pipeline.shared.cache import SharedCache
from encode_server.prepare.preparers import Room
from encode_server.runtime.pools import Pace, Pools, run_sized
from encode_server.telemetry.metrics import Metrics
from encode_server.telemetry.tracing import Tracing, recorded_context
from encode_server.wire.embedding import Encoded, EncodedItem, OutgoingRoom, Wanted, embedding_bytes
from encode_server.wire.frames import ItemInfo
from encode_server.wire.items import ItemOptions
from encode_server.wire.metadata import metadata_of
from encode_server.wire.modality import Modality
from encode_server.wire.pools import POOLED_TOKENS, Pool
from encode_server.wire.preparers import PreparedItem
from encode_server.wire.ranks import EncoderInfo

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Preparers(Protocol):
    """Whoever turns media bytes into tensors in the arena; see `prepare.preparers.Preparers`."""

    async def prepare(
        self,
        modality: Modality,
        media: bytes,
        options: ItemOptions,
        *,
        max_cost: int,
        room: Room,
        express: bool = False,
    ) -> PreparedItem:
        """Prepare one item, and copy its tensors to where `room` says. Raises EncodeError."""


class ReadyEngine(Protocol):
    """Whoever says what the ranks loaded, and waits until they have."""

    async def until_ready(self, group: int | None = None) -> EncoderInfo:
        """Return once forwards can be sent. Raises NotReady when they never will be, or when `group`, the only one
        that is to encode, takes none."""


@dataclass(frozen=True)
class Route:
    """What a request passes on its way. A health probe has a route of its own: no cache, a thread that each preparer
    keeps for probes, room of its own in the arena, the next turn in the queue, and no trace in the stages' metrics.

    `cache` None: every item is encoded. `shared` None: no other server is asked for an embedding. `metrics` None:
    nothing is observed. `tracing` None: nothing is traced. `trusting`: a caller who names the digest of media gets what
    is known for that digest, without showing the media. `group`: the only group of ranks that is to encode.
    """

    cache: EmbeddingCache | None
    metrics: Metrics | None
    tracing: Tracing | None = None
    shared: SharedCache | None = None
    trusting: bool = False
    express: bool = False
    group: int | None = None


class Pipeline:
    """Turns requests into embeddings. Everything slow happens in the preparers, the ranks or the pools, never on the
    loop."""

    def __init__(
        self,
        *,
        model: str,
        modalities: frozenset[Modality],
        source: MediaSource,
        pools: Pools,
        preparers: Preparers,
        arena: Arena,
        engine: ReadyEngine,
        batcher: Batcher,
        max_item_tokens: int,
    ) -> None:
        self.modalities = modalities
        self._model, self._source, self._pools, self._preparers = model, source, pools, preparers
        self._arena, self._engine, self._batcher = arena, engine, batcher
        self._max_item_tokens = max_item_tokens

    async def encode(self, request: EncodeRequest, route: Route) -> Encoded:
        """The embedding of a request. Its arena slots are free afterwards, however it ends.

        Raises EncodeError; an error about one item names the item. Cancellation ends what has not started.
        """
        if request.modality not in self.modalities:
            has = ", ".join(sorted(self.modalities))
            raise UnsupportedModality(f"this model has no encoder for {request.modality}, it takes: {has}")
        info = await self._engine.until_ready(route.group)
        pool = request.pool
        if pool is not None and pool not in (there := info.pools(request.modality)):
            raise BadRequest(
                f"pool is {pool.value!r}, which this model lacks for {request.modality}; it has: {', '.join(there)}"
            )
        dim = _dim(info, request.modality, pool)
        if len(request.items) == 1:
            items = [await self._encode_item(request, route, 0, request.items[0])]
        else:
            items = await self._encode_all(request, route)
        return Encoded(request.modality, self._model, info.dtype, dim, items)

    async def _encode_all(self, request: EncodeRequest, route: Route) -> list[EncodedItem]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._encode_item(request, route, index, item))
                    for index, item in enumerate(request.items)
                ]
        except* EncodeError as errors:
            raise first_of(errors) from None
        return [task.result() for task in tasks]

    async def _encode_item(self, request: EncodeRequest, route: Route, index: int, item: MediaItem) -> EncodedItem:
        try:
            return await self._encode_cached(request, route, item)
        except EncodeError as error:
            raise (error.about_item(index) if error.status < 500 else error) from None

    async def _encode_cached(self, request: EncodeRequest, route: Route, item: MediaItem) -> EncodedItem:
        if route.trusting and (found := await self._claimed(request, route, item)) is not None:
            return found
        clock = _StageClock(request, route)
        media = await self._fetch(request, item)
        clock.lap("fetch")
        digest = await run_sized(self._pools.work, Pace.HASH, len(media), _digest, media)
        if item.content_hash is not None and item.content_hash.lower() != digest:
            # The true digest would tell whoever cannot read the media what they are.
            raise BadRequest("content_hash is not that of the media")
        if route.cache is None:
            there = await self._recalled(request, route, item, digest)
            return there if there is not None else await self._compute(request, route, item, media, digest)
        key = CacheKey(request.modality, digest, item.options)
        computed = False

        async def compute() -> EncodedItem:
            nonlocal computed
            if (found := await self._recalled(request, route, item, digest)) is not None:
                computed = True  # what is read from the store is charged like what is encoded
                return found
            info = await self._engine.until_ready()
            kind = info.dtype, _dim(info, request.modality, item.options.pool)
            if route.shared is not None and (found := await route.shared.get(key, *kind)) is not None:
                return _described(found, info, request.modality, item.options)
            computed = True
            ours = await self._compute(request, route, item, media, digest)
            if route.shared is not None:
                route.shared.put(key, ours, *kind)
            return ours

        kept, _ = await route.cache.get(key, compute)
        return kept if computed else _shared(request, item, kept)

    async def _claimed(self, request: EncodeRequest, route: Route, item: MediaItem) -> EncodedItem | None:
        """What is known for the digest that the caller names. Everything kept was kept under a digest computed here or
        by another server, so a wrong claim gives its caller a wrong embedding, and nobody else."""
        claim = (item.content_hash or "").lower()
        if route.cache is None or not DIGEST.fullmatch(claim):
            return None
        key = CacheKey(request.modality, claim, item.options)
        if (kept := await route.cache.find(key)) is None and route.shared is not None:
            info = await self._engine.until_ready()
            dim = _dim(info, request.modality, item.options.pool)
            if (kept := await route.shared.get(key, info.dtype, dim)) is not None:
                kept = _described(kept, info, request.modality, item.options)
                route.cache.keep(key, kept)
        return None if kept is None else _shared(request, item, kept)

    async def _fetch(self, request: EncodeRequest, item: MediaItem) -> bytes:
        if isinstance(item.source, bytes):
            return item.source
        return await self._source.fetch(item.source, request.grow, request.client)

    async def _recalled(self, request: EncodeRequest, route: Route, item: MediaItem, digest: str) -> EncodedItem | None:
        """The item from where a former request has left it. The shared cache is not given such an item: the store goes
        by the model's name, the shared cache by the checkpoint's weights."""
        if request.recall is None:
            return None
        info = await self._engine.until_ready(route.group)
        dim = _dim(info, request.modality, item.options.pool)
        wanted = Wanted(item.uuid, item.options, request.modality, digest, self._model, info.dtype, dim)
        if (kept := await request.recall(wanted, request.expect)) is not None:
            request.has_rows(item, kept.info.tokens)
        return kept

    async def _compute(
        self, request: EncodeRequest, route: Route, item: MediaItem, media: bytes, digest: str
    ) -> EncodedItem:
        """Prepare and forward one item."""
        clock = _StageClock(request, route)
        info = await self._engine.until_ready(route.group)
        pool = item.options.pool
        dim = _dim(info, request.modality, pool)
        job = Job(
            self._arena,
            request.modality,
            request.deadline,
            client=request.client,
            reserved=route.express,
            group=route.group,
        )
        if route.tracing is not None:
            job.trace = recorded_context()
        weighed = expected = 0

        def expect(nbytes: int) -> None:
            nonlocal expected
            if nbytes > expected:  # an item that is prepared again comes here again
                request.expect(nbytes - expected)
                expected = nbytes

        async def room(prepared: PreparedItem) -> int:
            nonlocal weighed
            clock.lap("preprocess")
            if prepared.cost > self._max_item_tokens:
                raise TooLarge(f"it has {prepared.cost} patches or frames, at most {self._max_item_tokens} are encoded")
            request.weigh(tokens=prepared.cost - weighed)
            weighed = prepared.cost
            rows = 1 if pool in (Pool.MEAN, Pool.CLS) else prepared.tokens  # that are kept until all is delivered
            expect(embedding_bytes(rows, dim, info.dtype))
            request.has_rows(item, rows)
            return await job.acquire(prepared, dim, info.dtype)

        try:
            prepared = await self._preparers.prepare(
                request.modality,
                media,
                item.options,
                max_cost=self._batcher.budget(request.modality),
                room=room,
                express=route.express,
            )
            clock.lap("copy")
            self._batcher.submit(job)
            await job.finished
            # Out of the arena immediately: a slow or late destination must not hold room that the next batch needs.
            outgoing = _outgoing(request, route, item, job.nbytes)
            embedding = await run_sized(self._pools.send, Pace.COPY, job.nbytes, job.copy_embedding, outgoing)
        finally:
            job.release()
        tokens, extra = prepared.tokens, prepared.extra
        if pool in (Pool.MEAN, Pool.CLS):
            rows = embedding
            embedding = await run_sized(self._pools.send, Pace.HASH, rows.nbytes, pooled, rows, info.dtype, dim, pool)
            tokens, extra = 1, {**extra, POOLED_TOKENS: tokens}
        clock.note("queue", job.queue_s)
        clock.note("forward", job.forward_s)
        if route.tracing is not None:
            _trace_forward(route.tracing, job)
        if route.metrics is not None:
            route.metrics.preprocessed[request.modality].inc()
        grid = list(prepared.grid_thw) if prepared.grid_thw else None
        encoded = EncodedItem(ItemInfo(tokens, grid, digest), extra, embedding)
        return _described(encoded, info, request.modality, item.options)


class _StageClock:
    def __init__(self, request: EncodeRequest, route: Route) -> None:
        self._request, self._metrics, self._tracing = request, route.metrics, route.tracing
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.note(stage, now - self._last)
        if self._tracing is not None:
            self._tracing.stage(stage, now - self._last)
        self._last = now

    def note(self, stage: str, seconds: float) -> None:
        self._request.spent(stage, seconds)
        if self._metrics is not None:
            self._metrics.stage[self._request.modality][stage].observe(seconds)


def _trace_forward(tracing: Tracing, job: Job) -> None:
    """The job's time in the queue and in its batches, which are over."""
    ago = time.monotonic() - job.ended_at
    forward_s = job.ended_at - job.began_at
    tracing.stage("queue", job.queue_s, ended_s_ago=ago + forward_s)
    tracing.stage("forward", forward_s, ended_s_ago=ago, links=job.batches)


def _outgoing(request: EncodeRequest, route: Route, item: MediaItem, nbytes: int) -> OutgoingRoom | None:
    """Where the item's rows are delivered from, if nothing but the delivery will keep them: what a cache keeps must not
    hold the room of others' deliveries, nor lie where the transport's peers can write."""
    kept = route.shared is not None or (route.cache is not None and route.cache.keeps(nbytes))
    alone = len(request.items) == 1 and item.options.pool is None  # others are put together or reduced first
    return request.outgoing if alone and not kept else None


def _dim(info: EncoderInfo, modality: Modality, pool: Pool | None) -> int:
    """The width of an embedding."""
    return info.pooled[modality] if pool is Pool.MODEL else info.dims[modality]


def _described(item: EncodedItem, info: EncoderInfo, modality: Modality, options: ItemOptions) -> EncodedItem:
    """The item with what an engine takes in place of the media, and with the options that the item was encoded with."""
    metadata = None
    if options.pool is None:  # one vector has no place in a prompt
        metadata = metadata_of(info.model_type, modality, item.info.grid_thw, item.extra)
    return replace(item, info=msgspec.structs.replace(item.info, metadata=metadata), options=options)


def _shared(request: EncodeRequest, item: MediaItem, kept: EncodedItem) -> EncodedItem:
    """An embedding that was not made for this request, charged to the request."""
    request.has_rows(item, kept.info.tokens)
    request.share(kept.data)
    return replace(kept, info=msgspec.structs.replace(kept.info, cached=True))


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
