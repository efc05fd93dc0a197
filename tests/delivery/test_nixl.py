"""Embeddings that a receiver reads out of the server's memory, by a real NIXL between two agents."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import msgspec
import numpy as np
import pytest

from encode_server.client import EmbeddingReceiver
from encode_server.client.errors import ProtocolError
from encode_server.client.remote import RemoteReader
from encode_server.delivery.base import Part
from encode_server.delivery.native import NativePush
from encode_server.delivery.nixl import NixlAgent
from encode_server.delivery.push import Pusher
from encode_server.errors import DeliveryFailed
from encode_server.runtime.pools import Pools
from encode_server.vllm.inbox import Inbox
from encode_server.vllm.shelf import Shelf
from encode_server.wire.embedding import Encoded, EncodedItem, releasing
from encode_server.wire.frames import ItemInfo, RemoteMemory
from encode_server.wire.layout import ALIGNMENT
from encode_server.wire.modality import Modality
from encode_server.wire.remote import agent_types
from tests.live import eventually

try:
    agent_types()
except ImportError:
    pytest.skip("NIXL is not installed", allow_module_level=True)

PART = Part("r", 0, 1, Modality.IMAGE, "m")
DIM = 64


def encoded(rows: int, seed: int = 0) -> Encoded:
    values = np.random.default_rng(seed).random((rows, DIM), np.float32)
    item = EncodedItem(ItemInfo(rows, None, f"sha256:{seed}"), {}, memoryview(values.tobytes()))
    return Encoded(Modality.IMAGE, "m", "float32", DIM, [item])


@contextlib.asynccontextmanager
async def desk(pool_mb: int = 8, timeout_s: float = 20):
    pools, pusher, agent = Pools(2), Pusher(timeout_s), NixlAgent(pool_mb << 20)
    try:
        yield lambda port: NativePush(pusher, f"tcp://127.0.0.1:{port}", pools.send, agent), agent
    finally:
        agent.close()
        pusher.close()
        pools.close()


def test_a_receiver_reads_many_embeddings_of_every_size():
    async def scenario():
        async with desk() as (push, agent), EmbeddingReceiver(nixl=True) as receiver:
            for rows in (0, 1, 1000, 8192):
                await asyncio.gather(
                    *(push(receiver.port).deliver(part_of(f"{rows}-{seed}"), encoded(rows, seed)) for seed in range(5))
                )
                for seed in range(5):
                    got = await receiver.receive(f"{rows}-{seed}", timeout=20)
                    assert bytes(got.data) == bytes(encoded(rows, seed).items[0].data)
            assert agent.room.used_bytes == 0 and not agent._taken and receiver.rejected == 0

    asyncio.run(scenario())


def part_of(req_id: str) -> Part:
    return Part(req_id, 0, 1, Modality.IMAGE, "m")


def test_a_receiver_that_does_not_read_holds_nothing_for_long():
    async def scenario():
        async with desk(timeout_s=0.5) as (push, agent), EmbeddingReceiver() as receiver:
            with pytest.raises(DeliveryFailed, match="did not read"):
                await push(receiver.port).deliver(PART, encoded(1000))
            assert receiver.rejected == 1  # it says that it does not do that
            assert agent.room.used_bytes == 0 and not agent._taken

    asyncio.run(scenario())


def test_what_finds_no_room_is_pushed():
    async def scenario():
        async with desk(pool_mb=1) as (push, agent), EmbeddingReceiver(nixl=True) as receiver:
            others = agent.room.copy(memoryview(bytes(900_000)))
            for rows in (8192, 1000):  # larger than the memory; larger than what is free
                await push(receiver.port).deliver(part_of(str(rows)), encoded(rows))
                got = await receiver.receive(str(rows), timeout=20)
                assert bytes(got.data) == bytes(encoded(rows).items[0].data)
            assert agent.room.used_bytes == -(-others.nbytes // ALIGNMENT) * ALIGNMENT

    asyncio.run(scenario())


def test_an_embedding_is_copied_into_the_memory_once_and_registers_nothing(monkeypatch):
    async def scenario():
        async with desk() as (push, agent), EmbeddingReceiver(nixl=True) as receiver:
            registered = []
            monkeypatch.setattr(agent._agent, "register_memory", registered.append)
            for number in range(3):
                made = encoded(1000, number)
                there = agent.room.copy(made.items[0].data)
                made.items[0] = EncodedItem(made.items[0].info, {}, there)
                assert agent.room.holds(made.contiguous(agent.room))
                used = agent.room.used_bytes
                delivery = asyncio.create_task(push(receiver.port).deliver(part_of(str(number)), made))
                got = await receiver.receive(str(number), timeout=20)
                assert bytes(got.data) == bytes(there) and agent.room.used_bytes == used
                await delivery
                del there, made, delivery
                assert agent.room.used_bytes == 0
            assert not registered

    asyncio.run(scenario())


def test_a_cancelled_delivery_gives_its_room_back():
    async def scenario():
        async with desk() as (push, agent), EmbeddingReceiver() as receiver:  # who does not read
            delivery = asyncio.create_task(push(receiver.port).deliver(PART, encoded(8000)))
            while not agent._taken:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert agent.room.used_bytes > 0
            delivery.cancel()
            await asyncio.gather(delivery, return_exceptions=True)
            assert agent.room.used_bytes == 0 and not agent._taken

    gc.collect()
    gc.disable()  # the room must come back by itself
    try:
        asyncio.run(scenario())
    finally:
        gc.enable()


def test_memory_that_holds_something_else_by_now_is_found():
    async def scenario():
        async with desk() as (_, agent):
            reader = RemoteReader()
            with releasing(encoded(1000).contiguous(agent.room)) as data:
                async with agent.offer(data) as (memory, _):
                    assert await asyncio.to_thread(reader.read, memory, 256_000)
            other = encoded(1000, 1).contiguous(agent.room)
            with releasing(other), pytest.raises(ProtocolError, match="other bytes"):
                await asyncio.to_thread(reader.read, memory, 256_000)

    asyncio.run(scenario())


@pytest.mark.parametrize("agent", [b"", b"nonsense", b"\xff" * 451])
def test_a_header_that_leads_nowhere_is_an_error(agent):
    with pytest.raises(ProtocolError):
        RemoteReader(timeout_s=2).read(RemoteMemory("x", agent, 4096, b"t", 0), 100)


def test_vllms_connector_reads_as_well():
    async def scenario():
        shelf = Shelf(1 << 20, 60)
        inbox = Inbox("tcp://127.0.0.1:0", shelf, 1 << 20, nixl=True)
        try:
            async with desk() as (push, _):
                await push(int(inbox.endpoint.rpartition(":")[2])).deliver(PART, encoded(1000))
            assert eventually(lambda: shelf.get("r") is not None, 20)
            assert shelf.get("r").shape == (1000, DIM)
        finally:
            inbox.close()
            shelf.close()

    asyncio.run(scenario())


def test_headers_without_memory_are_as_they_were():
    from encode_server.wire.frames import EmbeddingHeader, decode_header

    old = msgspec.msgpack.encode({"req_id": "r", "model": "m", "modality": "image"})
    assert decode_header(old) == EmbeddingHeader("r", "m", Modality.IMAGE)
