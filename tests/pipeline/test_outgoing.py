"""Where an embedding goes from the ranks' memory: into a transport's, if nothing but its delivery will keep it."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest

from encode_server.delivery.outgoing import Outgoing
from encode_server.engine.arena import Arena
from encode_server.pipeline.cache import EmbeddingCache
from encode_server.pipeline.jobs import Job
from encode_server.pipeline.pipeline import Pipeline, Route
from encode_server.pipeline.request import EncodeRequest, MediaItem
from encode_server.runtime.pools import Pools
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.embedding import Encoded
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality
from encode_server.wire.pools import Pool
from tests.pipeline.desk import prepared

DIM = 4
ROWS = 100
NBYTES = ROWS * DIM * 4
ALL = [[float(row)] * DIM for row in range(ROWS)]


class Ranks:
    """Preparers, ranks and their batcher in one: every item has `ROWS` rows, and row n is full of n."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    async def until_ready(self, group=None):
        return SimpleNamespace(model_type="qwen3_vl", dtype="float32", dims={Modality.IMAGE: DIM}, pools=lambda _: Pool)

    async def prepare(self, modality, media, options, *, max_cost, room, express):
        item = prepared(ROWS)
        await room(item)
        return item

    def budget(self, modality) -> int:
        return 1000

    def submit(self, job: Job) -> None:
        (piece,) = job.pieces
        job.began(piece)
        there = self._arena.view(piece.item.output.offset, NBYTES).cast("f")
        there[:] = memoryview(np.array(ALL, np.float32).reshape(-1))
        job.ended(piece)


class Shared:
    """A shared cache that has nothing."""

    async def get(self, *_):
        return None

    def put(self, *_) -> None:
        pass


def encode(
    outgoing: Outgoing, *, items: int = 1, cache_bytes: int = 0, shared: bool = False, pool: Pool | None = None
) -> Encoded:
    arena, pools = Arena(1 << 20), Pools(1)
    ranks = Ranks(arena)
    pipeline = Pipeline(
        model="m",
        modalities=frozenset({Modality.IMAGE}),
        source=None,
        pools=pools,
        preparers=ranks,
        arena=arena,
        engine=ranks,
        batcher=ranks,
        max_item_tokens=1000,
    )
    route = Route(EmbeddingCache(cache_bytes, Metrics()), None, shared=Shared() if shared else None)
    media = [MediaItem(f"media {number}".encode(), ItemOptions(pool=pool)) for number in range(items)]
    request = EncodeRequest("r", Modality.IMAGE, media, time.monotonic() + 60, outgoing=outgoing)
    try:
        encoded = asyncio.run(pipeline.encode(request, route))
        assert arena.used == 0
        return encoded
    finally:
        pools.close()
        arena.close()


def rows(encoded: Encoded) -> list[list[float]]:
    return np.frombuffer(encoded.contiguous(), np.float32).reshape(-1, DIM).tolist()


def test_an_item_that_only_its_delivery_keeps_goes_straight_there():
    outgoing = Outgoing(1 << 20)
    encoded = encode(outgoing)
    assert outgoing.holds(encoded.items[0].data) and rows(encoded) == ALL
    del encoded
    assert outgoing.used_bytes == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cache_bytes": 1 << 20}, ALL),
        ({"shared": True}, ALL),
        ({"items": 2}, ALL + ALL),  # which are put together there when they are delivered
        ({"pool": Pool.CLS}, ALL[:1]),
    ],
)
def test_other_items_go_to_the_heap(options, expected):
    outgoing = Outgoing(1 << 20)
    encoded = encode(outgoing, **options)
    assert outgoing.used_bytes == 0 and rows(encoded) == expected


def test_an_item_that_the_cache_has_no_room_for_goes_straight_there():
    outgoing = Outgoing(1 << 20)
    assert outgoing.holds(encode(outgoing, cache_bytes=NBYTES).items[0].data)


def test_where_there_is_no_room_the_heap_serves():
    outgoing = Outgoing(NBYTES - 256)
    encoded = encode(outgoing)
    assert not outgoing.holds(encoded.items[0].data) and rows(encoded) == ALL
