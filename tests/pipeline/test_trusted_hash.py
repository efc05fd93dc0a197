"""A caller's content_hash: verified, or trusted for what is known already."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from encode_server.errors import BadRequest
from encode_server.pipeline.cache import EmbeddingCache
from encode_server.pipeline.pipeline import Pipeline, Route
from encode_server.pipeline.request import EncodeRequest, MediaItem
from encode_server.runtime.pools import Pools
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.embedding import EncodedItem, Recall, Wanted
from encode_server.wire.frames import ItemInfo
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality


def digest(media: str) -> str:
    return "sha256:" + hashlib.sha256(media.encode()).hexdigest()


class Shared:
    """A shared cache that has what it was given."""

    def __init__(self) -> None:
        self.items: dict[str, EncodedItem] = {}

    async def get(self, key, dtype, dim):
        return self.items.get(key.digest)

    def put(self, key, item, dtype, dim) -> None:
        self.items[key.digest] = item


class Desk:
    """A pipeline whose media are their URLs, and what it did."""

    def __init__(
        self, pools: Pools, *, trusting: bool, shared: Shared | None = None, cache_bytes: int = 1 << 20
    ) -> None:
        self.fetched: list[str] = []
        self.encoded: list[str] = []
        self.pipeline = Pipeline(
            model="m",
            modalities=frozenset({Modality.IMAGE}),
            source=self,
            pools=pools,
            preparers=None,
            arena=None,
            engine=self,
            batcher=None,
            max_item_tokens=1,
        )
        self.pipeline._compute = self.compute
        cache = EmbeddingCache(cache_bytes, Metrics())
        self.route = Route(cache, None, shared=shared, trusting=trusting)

    async def until_ready(self, group=None):
        return SimpleNamespace(model_type="qwen3_vl", dtype="float32", dims={Modality.IMAGE: 1})

    async def fetch(self, url, charge, client) -> bytes:
        self.fetched.append(url)
        return url.encode()

    async def compute(self, request, route, item, media, media_digest) -> EncodedItem:
        self.encoded.append(media.decode())
        await asyncio.sleep(0.01)
        return EncodedItem(ItemInfo(1, None, media_digest), {}, memoryview(media[:4]))

    async def item(self, url: str, content_hash: str | None = None, recall: Recall | None = None) -> EncodedItem:
        media = [MediaItem(url, content_hash=content_hash)]
        request = EncodeRequest("r", Modality.IMAGE, media, time.monotonic() + 60, recall=recall)
        (item,) = (await self.pipeline.encode(request, self.route)).items
        return item

    async def ask(self, url: str, content_hash: str | None = None) -> tuple[bytes, bool]:
        item = await self.item(url, content_hash)
        return bytes(item.data), item.info.cached


@contextlib.contextmanager
def desk(**options):
    pools = Pools(1)
    try:
        yield Desk(pools, **options)
    finally:
        pools.close()


@pytest.mark.parametrize("trusting", [False, True])
def test_only_a_trusting_server_answers_without_the_media(trusting):
    with desk(trusting=trusting) as server:

        async def scenario():
            assert await server.ask("cats", digest("cats")) == (b"cats", False)
            assert await server.ask("elsewhere/cats" if trusting else "cats", digest("cats")) == (b"cats", True)

        asyncio.run(scenario())
        assert server.fetched == ["cats"] if trusting else ["cats", "cats"]
        assert server.encoded == ["cats"]


def test_what_is_not_known_is_verified():
    with desk(trusting=True) as server:

        async def scenario():
            with pytest.raises(BadRequest):
                await server.ask("dogs", digest("cats"))
            assert await server.ask("cats", digest("cats").upper().replace("SHA", "sha")) == (b"cats", False)

        asyncio.run(scenario())
        assert server.encoded == ["cats"]  # nothing is kept under a hash that it does not have


def test_what_is_on_its_way_is_waited_for():
    with desk(trusting=True) as server:

        async def scenario():
            answers = await asyncio.gather(server.ask("cats"), later(server.ask("nowhere", digest("cats"))))
            assert answers == [(b"cats", False), (b"cats", True)]

        async def later(ask):
            while not server.encoded:  # noqa: ASYNC110
                await asyncio.sleep(0)
            return await ask

        asyncio.run(scenario())
        assert server.fetched == ["cats"]


def test_what_another_server_knows_is_enough_and_kept():
    shared = Shared()
    with desk(trusting=True, shared=shared) as server:

        async def scenario():
            shared.items[digest("cats")] = EncodedItem(ItemInfo(1, None, digest("cats")), {}, memoryview(b"cats"))
            assert await server.ask("nowhere", digest("cats")) == (b"cats", True)
            shared.items.clear()
            assert await server.ask("nowhere", digest("cats")) == (b"cats", True)

        asyncio.run(scenario())
        assert server.fetched == server.encoded == []


@pytest.mark.parametrize("claimed", [False, True])
def test_what_another_server_knows_is_described_like_our_own(claimed):
    shared = Shared()
    shared.items[digest("cats")] = EncodedItem(ItemInfo(1, [1, 2, 2], digest("cats")), {}, memoryview(b"cats"))
    with desk(trusting=claimed, shared=shared) as server:
        item = asyncio.run(server.item("cats", digest("cats") if claimed else None))
        assert item.info.metadata == {"image_grid_thw": [1, 2, 2]} and item.options == ItemOptions()
        assert server.encoded == []


def test_what_a_store_has_is_not_encoded_and_stays_in_the_store():
    async def recall(wanted: Wanted, expect: Callable[[int], None]) -> EncodedItem | None:
        return EncodedItem(ItemInfo(1, None, wanted.digest, cached=True), {}, memoryview(b"cats"))

    shared = Shared()
    with desk(trusting=False, shared=shared) as server:
        assert asyncio.run(server.item("cats", recall=recall)).info.cached
        assert server.encoded == [] and not shared.items


@pytest.mark.parametrize("claim", ["sha256:", "md5:" + "0" * 64, "sha256:" + "g" * 64, "", None])
def test_what_is_no_digest_is_no_claim(claim):
    with desk(trusting=True) as server:
        if claim is None:
            assert asyncio.run(server.ask("cats", claim)) == (b"cats", False)
        else:
            with pytest.raises(BadRequest):
                asyncio.run(server.ask("cats", claim))
