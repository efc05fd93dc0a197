"""One encode per content, at most so many bytes, and nobody is served another's failure."""

import asyncio

import pytest

from encode_server.errors import BadMedia, NotReady
from encode_server.pipeline.cache import CacheKey, EmbeddingCache
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.embedding import EncodedItem
from encode_server.wire.frames import ItemInfo
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality


def key(name: str, **options) -> CacheKey:
    return CacheKey(Modality.IMAGE, f"sha256:{name}", ItemOptions(**options))


def item(size: int = 1000) -> EncodedItem:
    return EncodedItem(ItemInfo(1, None, "sha256:0"), {}, memoryview(bytes(size)))


def counting(results):
    calls = []

    async def compute():
        calls.append(None)
        await asyncio.sleep(0.01)
        result = results[min(len(calls), len(results)) - 1]
        if isinstance(result, Exception):
            raise result
        return result

    return calls, compute


def test_identical_items_at_once_cost_one_encode():
    async def scenario():
        cache = EmbeddingCache(1 << 20, Metrics())
        calls, compute = counting([item()])
        results = await asyncio.gather(*(cache.get(key("x"), compute) for _ in range(50)))
        assert len(calls) == 1
        assert [cached for _, cached in results].count(False) == 1
        assert (await cache.get(key("x"), compute))[1] and len(calls) == 1

    asyncio.run(scenario())


def test_other_options_are_another_result():
    async def scenario():
        cache = EmbeddingCache(1 << 20, Metrics())
        calls, compute = counting([item()])
        await cache.get(key("x"), compute)
        await cache.get(key("x", max_pixels=100), compute)
        assert len(calls) == 2

    asyncio.run(scenario())


def test_bytes_are_bounded_and_the_least_used_goes_first():
    async def scenario():
        cache = EmbeddingCache(20_000, Metrics())
        calls, compute = counting([item(4000)])
        for name in "abc":
            await cache.get(key(name), compute)
        await cache.get(key("a"), compute)
        await cache.get(key("d"), compute)  # b is the one not used for longest
        assert cache.bytes <= 20_000 and len(calls) == 4
        assert (await cache.get(key("a"), compute))[1]
        assert not (await cache.get(key("b"), compute))[1]

    asyncio.run(scenario())


def test_without_a_budget_nothing_is_kept():
    async def scenario():
        cache = EmbeddingCache(0, Metrics())
        calls, compute = counting([item()])
        await cache.get(key("x"), compute)
        await cache.get(key("x"), compute)
        assert len(calls) == 2 and cache.bytes == 0

    asyncio.run(scenario())


def test_bad_media_is_bad_for_all_and_not_remembered():
    async def scenario():
        cache = EmbeddingCache(1 << 20, Metrics())
        calls, compute = counting([BadMedia("broken")])
        results = await asyncio.gather(*(cache.get(key("x"), compute) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(result, BadMedia) for result in results) and len(calls) == 1
        with pytest.raises(BadMedia):
            await cache.get(key("x"), compute)
        assert len(calls) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("failure", [NotReady("the ranks are gone"), asyncio.CancelledError()])
def test_a_leader_that_fails_for_its_own_reason_hands_over(failure):
    async def scenario():
        cache = EmbeddingCache(1 << 20, Metrics())
        calls, compute = counting([failure, item()] if not isinstance(failure, asyncio.CancelledError) else [item()])
        leader = asyncio.create_task(cache.get(key("x"), compute))
        await asyncio.sleep(0)
        followers = [asyncio.create_task(cache.get(key("x"), compute)) for _ in range(3)]
        await asyncio.sleep(0)
        if isinstance(failure, asyncio.CancelledError):
            leader.cancel()
        results = await asyncio.gather(*followers)
        assert all(result.data.nbytes == 1000 for result, _ in results) and len(calls) == 2
        with pytest.raises(type(failure)):
            await leader

    asyncio.run(scenario())
