"""Embeddings that are written into a destination's memory: sizes told early, each written once, none after its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from encode_server.delivery.base import Part
from encode_server.delivery.destinations import DestinationPolicy
from encode_server.delivery.sglang.deliveries import SGLangDeliveries
from encode_server.delivery.sglang.endpoints import add_sglang_routes
from encode_server.delivery.sglang.registrations import Landing, Offer
from encode_server.errors import BadMedia, BadRequest, DeadlineExceeded, DeliveryFailed, Duplicate, Forbidden
from encode_server.wire.embedding import Encoded, EncodedItem
from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality

PART = Part("r", 0, 1, Modality.IMAGE, "m")
DATA = bytes(range(48))
WAIT_S = 20


class World:
    """The deliveries, and what reached the outside."""

    def __init__(self, wait_s: float = WAIT_S) -> None:
        self.room = None
        self.written: list[tuple[str, int, bytes]] = []
        self.pushed: list[tuple[str, int]] = []
        self.told: list[str] = []
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun = asyncio.Event()
        self.deliveries = SGLangDeliveries(self, self, self.pickles, None, wait_s, self)

    async def pickles(self, *_):
        return None

    def header(self, *_) -> bytes:
        return b"header"

    def error(self, *_) -> bytes:
        return b"error"

    async def push(self, endpoint, frames) -> None:
        self.pushed.append((endpoint, len(frames)))

    def notify(self, endpoint, frames) -> None:
        self.told.append(endpoint)

    async def write(self, session, address, data) -> None:
        self.begun.set()
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.written.append((session, address, bytes(data)))

    def offer(self, port: int, count: int = 1, nbytes: int = len(DATA)) -> Landing:
        landing = Landing(f"10.0.0.1:{port + 1}", port * 1000, nbytes)
        self.deliveries.registrations.register("r", Offer(f"tcp://10.0.0.1:{port}", "c", landing), count)
        return landing

    async def deliver(self) -> None:
        item = EncodedItem(ItemInfo(3, [1, 2, 6], "sha256:0"), {}, memoryview(DATA))
        encoded = Encoded(Modality.IMAGE, "m", "float32", 4, [item])
        with self.deliveries.to_registered("r", lambda offer: True) as push:
            try:
                await push.deliver(PART, encoded)
            except DeliveryFailed as error:
                await push.fail(PART, error)
                raise

    def is_empty(self) -> bool:
        return len(self.deliveries.registrations) == len(self.deliveries.sizes) == 0


def run(scenario: Callable, **options) -> None:
    async def main():
        async with asyncio.timeout(60):
            await scenario(World(**options))

    asyncio.run(main())


def test_each_rank_gets_the_embedding_and_then_its_header():
    async def scenario(world: World):
        first = world.offer(1, count=2)
        delivery = asyncio.create_task(world.deliver())
        await first.until_landed(WAIT_S)
        assert not delivery.done()
        second = world.offer(2, count=2)
        await asyncio.gather(delivery, second.until_landed(WAIT_S))
        assert world.written == [("10.0.0.1:2", 1000, DATA), ("10.0.0.1:3", 2000, DATA)]
        assert world.pushed == [("tcp://10.0.0.1:1", 1), ("tcp://10.0.0.1:2", 1)]  # the header alone
        assert world.is_empty()

    run(scenario)


def test_a_size_is_told_before_the_embedding_exists_to_whoever_asks_before_or_after():
    async def scenario(world: World):
        early = asyncio.create_task(world.deliveries.sizes.ask("r", WAIT_S))
        await asyncio.sleep(0)
        with world.deliveries.to_registered("r", lambda offer: True) as push:
            push.announce("r", 3, 4, "float32")
            late = await world.deliveries.sizes.ask("r", WAIT_S)
            assert (late.rows, late.dim, late.nbytes) == (3, 4, 48) and await early == late
        assert world.is_empty()

    run(scenario)


def test_a_part_that_fails_says_so_to_those_who_wait_and_to_those_who_come_later():
    async def scenario(world: World):
        early = asyncio.create_task(world.deliveries.sizes.ask("r", WAIT_S))
        landing = world.offer(1)
        with world.deliveries.to_registered("r", lambda offer: True) as push:
            await asyncio.sleep(0)
            await push.fail(PART, BadMedia("no image"))
        for asked in (early, world.deliveries.sizes.ask("r", WAIT_S), landing.until_landed(WAIT_S)):
            with pytest.raises(BadMedia, match="no image"):
                await asked
        assert world.is_empty() and not world.told

    run(scenario)


def test_a_size_that_nobody_tells_is_not_waited_for_forever():
    async def scenario(world: World):
        with pytest.raises(DeadlineExceeded):
            await world.deliveries.sizes.ask("r", 0.01)
        assert world.is_empty()

    run(scenario)


def test_nothing_is_written_once_the_destination_was_told_an_end():
    async def scenario(world: World):
        landing = world.offer(1)
        with pytest.raises(DeliveryFailed):
            await landing.until_landed(0.01)
        with pytest.raises(DeliveryFailed, match="given its memory away"):
            await world.deliver()
        assert not world.written and not world.pushed and world.is_empty()

    run(scenario)


def test_no_end_is_told_while_the_embedding_is_being_written():
    async def scenario(world: World):
        world.gate.clear()
        landing = world.offer(1)
        delivery = asyncio.create_task(world.deliver())
        await world.begun.wait()
        waiting = asyncio.create_task(landing.until_landed(0.01))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        world.gate.set()
        await asyncio.gather(waiting, delivery)
        assert world.written

    run(scenario)


def test_a_transfer_that_fails_fails_the_part_and_the_waiting_rank():
    async def scenario(world: World):
        world.failure = DeliveryFailed("the peer is gone")
        landing = world.offer(1)
        with pytest.raises(DeliveryFailed, match="the peer is gone"):
            await world.deliver()
        with pytest.raises(DeliveryFailed, match="the peer is gone"):
            await landing.until_landed(WAIT_S)
        assert not world.pushed and world.is_empty()

    run(scenario)


def test_memory_of_another_size_is_not_written_to():
    async def scenario(world: World):
        landing = world.offer(1, nbytes=47)
        with pytest.raises(DeliveryFailed, match="48 bytes"):
            await world.deliver()
        with pytest.raises(DeliveryFailed):
            await landing.until_landed(WAIT_S)
        assert not world.written

    run(scenario)


def test_memory_offered_twice_is_refused_and_offered_for_nothing_is_given_back():
    async def scenario(world: World):
        landing = world.offer(1)
        with pytest.raises(Duplicate):
            world.offer(1)
        world.deliveries.close()
        with pytest.raises(DeliveryFailed):
            await landing.until_landed(WAIT_S)
        assert world.is_empty()

    run(scenario)


def test_ranks_that_never_come_end_the_part():
    async def scenario(world: World):
        landing = world.offer(1, count=2)
        with pytest.raises(DeadlineExceeded, match="1 of 2"):
            await world.deliver()
        await landing.until_landed(WAIT_S)  # it had the embedding before
        assert world.is_empty()

    run(scenario, wait_s=0.05)


@contextlib.asynccontextmanager
async def http(world: World, wait_s: float = WAIT_S):
    """The routes, as a prefill rank calls them."""
    router = APIRouter()
    policy = DestinationPolicy(())
    add_sglang_routes(router, lambda: world.deliveries, policy, lambda request: "c", wait_s, mooncake=True)
    app = FastAPI()
    app.include_router(router)
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=WAIT_S) as client:
        yield client


def sent(**fields) -> dict:
    """As SGLang's receiver writes it: the answer about the size, and where the embedding goes."""
    return {
        "req_id": "r",
        "part_idx": 0,
        "embedding_size": 48,
        "embedding_len": 3,
        "embedding_dim": 4,
        "prefill_host": "127.0.0.1",
        "embedding_port": 5000,
        "session_id": "127.0.0.1:5001",
        "buffer_address": 139872301285376,
        "receive_count": 1,
    } | fields


def test_a_rank_asks_for_the_size_and_says_where():
    async def scenario(world: World):
        async with http(world) as client:
            size = asyncio.create_task(client.post("/scheduler_receive_meta_data", json={"req_id": "r", "part_idx": 0}))
            delivery = asyncio.create_task(world.deliver())
            known = {"req_id": "r", "part_idx": 0, "embedding_size": 48, "embedding_len": 3, "embedding_dim": 4}
            assert (await size).json() == known
            assert (await client.post("/send", json=sent())).json() is None
            await delivery
        assert world.written == [("127.0.0.1:5001", 139872301285376, DATA)]

    run(scenario)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"session_id": "127.0.0.2:5001"}, BadRequest),
        ({"session_id": "127.0.0.1"}, BadRequest),
        ({"prefill_host": "8.8.8.8", "session_id": "8.8.8.8:1"}, Forbidden),
        ({"session_id": "8.8.8.8:1"}, Forbidden),
        ({"buffer_address": -1}, BadRequest),
        ({"buffer_address": 2**64}, BadRequest),
        ({"receive_count": 0}, BadRequest),
    ],
)
def test_memory_elsewhere_is_refused(fields, error):
    async def scenario(world: World):
        async with http(world) as client:
            with pytest.raises(error):
                await client.post("/send", json=sent(**fields))
        assert world.is_empty()

    run(scenario)
