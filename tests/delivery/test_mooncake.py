"""A real Mooncake writes embeddings into another's memory: no delivery registers any, and all room comes back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable

import numpy as np
import pytest

from encode_server.delivery.base import Part
from encode_server.delivery.mooncake import MooncakeEngine
from encode_server.delivery.sglang.deliveries import SGLangDeliveries
from encode_server.delivery.sglang.registrations import Landing, Offer
from encode_server.errors import DeadlineExceeded, DeliveryFailed
from encode_server.runtime.pools import Pools
from encode_server.wire.embedding import Encoded, EncodedItem
from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality

mooncake = pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")

MIB = 1 << 20
POOL_BYTES = 4 * MIB
PART = Part("r", 0, 1, Modality.IMAGE, "m")
NOBODY = "127.0.0.1:1"


class WatchedEngine(mooncake.TransferEngine):
    """Mooncake's engine, that counts and can be held up."""

    registered = 0  # as often as there was one
    gate = threading.Event()
    begun = threading.Event()

    def register_memory(self, address, nbytes):
        WatchedEngine.registered += 1
        return super().register_memory(address, nbytes)

    def transfer_sync_write(self, *transfer):
        WatchedEngine.begun.set()
        assert WatchedEngine.gate.wait(60)
        return super().transfer_sync_write(*transfer)


@pytest.fixture(scope="module")
def engine():
    """With `POOL_BYTES` of registered memory; one for all tests, because its end takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mooncake, "TransferEngine", WatchedEngine)
        engine = MooncakeEngine("127.0.0.1", "tcp", "", POOL_BYTES)
    assert WatchedEngine.registered == 1
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def rank():
    """A prefill's memory: the session, and the bytes."""
    engine = mooncake.TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    room = np.zeros(4 * MIB, np.uint8)
    assert engine.register_memory(room.ctypes.data, room.nbytes) == 0
    return f"127.0.0.1:{engine.get_rpc_port()}", room, engine


class Frames:
    """In place of the pusher, of SGLang's frames and of who pickles for them."""

    def header(self, *_) -> bytes:
        return b"header"

    async def push(self, endpoint, frames) -> None:
        pass

    async def pickles(self, *_) -> None:
        return None


class World:
    """The deliveries of a server."""

    def __init__(self, engine: MooncakeEngine, pools: Pools, wait_s: float) -> None:
        self.engine = engine
        frames = Frames()
        self.deliveries = SGLangDeliveries(frames, frames, frames.pickles, pools.send, wait_s, self.engine)
        WatchedEngine.registered = 0
        WatchedEngine.begun.clear()
        WatchedEngine.gate.set()

    def expect(self, session: str, address: int, nbytes: int, count: int = 1, number: int = 1) -> None:
        landing = Landing(session, address, nbytes)
        offer = Offer(f"tcp://127.0.0.1:{number}", "c", landing)
        self.deliveries.registrations.register("r", offer, count)

    async def deliver(self, encoded: Encoded) -> None:
        with self.deliveries.to_registered("r", lambda offer: True) as push:
            await push.deliver(PART, encoded)


def run(engine: MooncakeEngine, scenario: Callable, *, wait_s: float = 20) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            pools = Pools(2)
            world = World(engine, pools, wait_s)
            try:
                await scenario(world)
            finally:
                WatchedEngine.gate.set()
                pools.close()

    asyncio.run(main())


def embedding(*kilobytes: int) -> Encoded:
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 256, (each, 1024), np.uint8) for each in kilobytes]
    items = [EncodedItem(ItemInfo(len(each), None, "sha256:0"), {}, each.reshape(-1).data) for each in rows]
    return Encoded(Modality.IMAGE, "m", "float32", 256, items)


def joined(encoded: Encoded) -> bytes:
    return b"".join(bytes(item.data) for item in encoded.items)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


@contextlib.contextmanager
def no_collection():
    """The room must come back by itself: a collection may be minutes away."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("kilobytes", [(1,), (100,), (2000,), (3, 500, 40)])
def test_a_delivery_registers_nothing(engine, rank, kilobytes):
    session, memory, _ = rank

    async def scenario(world: World):
        encoded = embedding(*kilobytes)
        for number in (1, 2):  # two receivers of one part
            address = memory.ctypes.data + (number - 1) * 2 * MIB
            world.expect(session, address, encoded.nbytes, count=2, number=number)
        memory[:] = 0
        await world.deliver(encoded)
        for begin in (0, 2 * MIB):
            assert memory[begin : begin + encoded.nbytes].tobytes() == joined(encoded)
        assert WatchedEngine.registered == 0
        assert world.engine.room.used_bytes == 0

    run(engine, scenario)


def test_what_lies_in_registered_memory_already_is_not_copied(engine, rank):
    session, memory, _ = rank

    async def scenario(world: World):
        made = embedding(2000)
        there = world.engine.room.copy(made.items[0].data)
        item = EncodedItem(made.items[0].info, {}, there)
        used = world.engine.room.used_bytes
        world.expect(session, memory.ctypes.data, made.nbytes)
        WatchedEngine.gate.clear()
        delivery = asyncio.create_task(world.deliver(Encoded(Modality.IMAGE, "m", "float32", 256, [item])))
        await asyncio.to_thread(WatchedEngine.begun.wait, 20)
        assert world.engine.room.used_bytes == used
        WatchedEngine.gate.set()
        await delivery
        assert memory[: made.nbytes].tobytes() == joined(made) and WatchedEngine.registered == 0
        del there, item, delivery
        assert world.engine.room.used_bytes == 0

    with no_collection():
        run(engine, scenario)


@pytest.mark.parametrize("pool", ["full", "none"])
def test_what_finds_no_room_is_registered_for_its_transfer(monkeypatch, engine, rank, pool):
    session, memory, _ = rank
    others = engine.room.copy(memoryview(bytes(3 * MIB)))
    if pool == "none":
        monkeypatch.setattr(engine, "room", None)

    async def scenario(world: World):
        for encoded in (embedding(2000), embedding(900, 900)):
            world.expect(session, memory.ctypes.data, encoded.nbytes)
            await world.deliver(encoded)
            assert memory[: encoded.nbytes].tobytes() == joined(encoded)
        assert WatchedEngine.registered == 2
        others.release()

    run(engine, scenario)


def test_deliveries_that_fail_give_their_room_back(engine, rank):
    session, memory, _ = rank

    async def scenario(world: World):
        encoded = embedding(500)
        world.expect(NOBODY, 4096, encoded.nbytes)
        with pytest.raises(DeliveryFailed) as died:  # whose traceback is kept until after the look
            await world.deliver(encoded)
        world.expect(session, memory.ctypes.data, encoded.nbytes - 1)
        with pytest.raises(DeliveryFailed) as mistaken:
            await world.deliver(encoded)
        world.expect(session, memory.ctypes.data, encoded.nbytes, count=2)
        with pytest.raises(DeadlineExceeded, match="1 of 2") as late:
            await world.deliver(encoded)
        await asyncio.sleep(0)
        assert world.engine.room.used_bytes == 0 and died and mistaken and late

    with no_collection():
        run(engine, scenario, wait_s=0.5)


def test_a_cancelled_delivery_keeps_its_room_until_the_transfer_has_ended(engine, rank):
    session, memory, _ = rank

    async def scenario(world: World):
        encoded = embedding(500)
        waiting = asyncio.create_task(world.deliver(encoded))  # for a rank that does not come
        await until(lambda: world.engine.room.used_bytes > 0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert world.engine.room.used_bytes == 0

        WatchedEngine.gate.clear()
        world.expect(session, memory.ctypes.data, encoded.nbytes)
        delivery = asyncio.create_task(world.deliver(encoded))
        await asyncio.to_thread(WatchedEngine.begun.wait, 20)
        delivery.cancel()
        await asyncio.sleep(0.05)
        assert world.engine.room.used_bytes > 0  # a thread of Mooncake's reads it
        WatchedEngine.gate.set()
        await asyncio.gather(delivery, return_exceptions=True)
        assert world.engine.room.used_bytes == 0
        assert memory[: encoded.nbytes].tobytes() == joined(encoded)

    with no_collection():
        run(engine, scenario)
