"""A request's way from its media to its embedding: fetch, preprocess, copy in, forward."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from encode_server.delivery.frames import ItemInfo
from encode_server.engine.arena import Arena
from encode_server.engine.messages import ItemRef, TensorRef
from encode_server.engine.supervisor import Supervisor
from encode_server.errors import BadRequest, EncodeError, UnsupportedModality
from encode_server.media.sources import MediaSource
from encode_server.modality import Modality
from encode_server.pipeline.batcher import Batcher
from encode_server.pipeline.pools import Pools, run, run_to_end
from encode_server.pipeline.request import Encoded, EncodedItem, EncodeRequest, MediaItem
from encode_server.pipeline.work import Work, layout, write_inputs
from encode_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from encode_server.models.prepared import Prepared
    from encode_server.models.preprocess import Preprocessor


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
        metrics: Metrics,
    ) -> None:
        self._model, self._preprocessor, self._source, self._pools = model, preprocessor, source, pools
        self._arena, self._engine, self._batcher, self._metrics = arena, engine, batcher, metrics

    @property
    def modalities(self) -> frozenset[Modality]:
        """What the model encodes."""
        return self._preprocessor.modalities

    @contextlib.asynccontextmanager
    async def encode(self, request: EncodeRequest) -> AsyncIterator[Encoded]:
        """The embedding of a request, valid inside the `async with`; its slots are free after it, however it ends.

        Raises EncodeError; one about an item names it. Cancellation ends what has not started.
        """
        if request.modality not in self.modalities:
            has = ", ".join(sorted(self.modalities))
            raise UnsupportedModality(f"this model has no encoder for {request.modality}, it takes: {has}")
        info = await self._engine.wait_ready()
        tasks: list[asyncio.Task[EncodedItem]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for index, item in enumerate(request.items):
                    tasks.append(group.create_task(self._encode_item(request, index, item)))
            items = [task.result() for task in tasks]
            yield Encoded(request.modality, self._model, info.dtype, info.dims[request.modality], items)
        except* EncodeError as errors:
            raise _first(errors) from None
        finally:
            for task in tasks:
                if task.done() and not task.cancelled() and task.exception() is None:
                    task.result().release()

    async def _encode_item(self, request: EncodeRequest, index: int, item: MediaItem) -> EncodedItem:
        try:
            return await self._through(request, item)
        except EncodeError as error:
            raise (error.about_item(index) if error.status < 500 else error) from None

    async def _through(self, request: EncodeRequest, item: MediaItem) -> EncodedItem:
        clock = _StageClock(request, self._metrics)
        pool = self._pools.urgent if request.urgent else self._pools.preproc
        data = item.source if isinstance(item.source, bytes) else await self._source.fetch(item.source)
        clock.lap("fetch")
        prepared, digest = await run(pool, self._prepare, request.modality, data, item)
        del data
        clock.lap("preprocess")
        work = await self._place(request, prepared)
        clock.lap("copy")
        try:
            self._batcher.submit(work)
            await work.finished
            clock.note("queue", work.queue_s)
            clock.note("forward", work.forward_s)
            encoded = EncodedItem(
                ItemInfo(prepared.tokens, list(prepared.grid_thw) if prepared.grid_thw else None, digest),
                prepared.extra,
                work.embedding(),
                work,
            )
            if len(request.items) > 1 or self._arena.contended:
                # Its neighbours may take long, or others wait for the room.
                await run_to_end(self._pools.send, encoded.detach)
                encoded.release()
            return encoded
        except BaseException:
            work.release()
            raise

    def _prepare(self, modality: Modality, data: bytes, item: MediaItem) -> tuple[Prepared, str]:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if item.content_hash is not None and item.content_hash.lower() != digest:
            raise BadRequest(f"content_hash is {item.content_hash!r}, the media's is {digest!r}")
        self._metrics.preprocessed.labels(modality).inc()
        return self._preprocessor.prepare(modality, data, item.options), digest

    async def _place(self, request: EncodeRequest, prepared: Prepared) -> Work:
        """Reserve room for the item's tensors and its embedding, and copy the tensors in."""
        info = await self._engine.wait_ready()
        dim = info.dims[request.modality]
        slots = await self._arena.acquire(layout(prepared, dim, info.dtype), urgent=request.urgent)
        try:
            pool = self._pools.urgent if request.urgent else self._pools.preproc
            inputs = await run_to_end(pool, write_inputs, self._arena, slots[0], prepared)
        except BaseException:
            self._arena.release(*slots)
            raise
        return Work(
            arena=self._arena,
            modality=request.modality,
            cost=prepared.cost,
            deadline=request.deadline,
            item=ItemRef(inputs, TensorRef("embedding", info.dtype, (prepared.tokens, dim), slots[1].offset)),
            input_slot=slots[0],
            output_slot=slots[1],
            urgent=request.urgent,
        )


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


def _first(errors: BaseExceptionGroup[EncodeError]) -> EncodeError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, EncodeError)
    return error
