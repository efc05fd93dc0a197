"""Embeddings that a receiver reads out of the server's memory, by a real NIXL between two agents."""

from __future__ import annotations

import asyncio
import contextlib

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
from encode_server.wire.embedding import Encoded, EncodedItem
from encode_server.wire.frames import ItemInfo, RemoteMemory
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
            assert agent._arena.used == 0 and not agent._taken and receiver.rejected == 0

    asyncio.run(scenario())


def part_of(req_id: str) -> Part:
    return Part(req_id, 0, 1, Modality.IMAGE, "m")


def test_a_receiver_that_does_not_read_holds_nothing_for_long():
    async def scenario():
        async with desk(timeout_s=0.5) as (push, agent), EmbeddingReceiver() as receiver:
            with pytest.raises(DeliveryFailed, match="did not read"):
                await push(receiver.port).deliver(PART, encoded(1000))
            assert receiver.rejected == 1  # it says that it does not do that
            assert agent._arena.used == 0 and not agent._taken

    asyncio.run(scenario())


def test_what_is_larger_than_the_memory_is_an_error():
    async def scenario():
        async with desk(pool_mb=1) as (push, _), EmbeddingReceiver(nixl=True) as receiver:
            with pytest.raises(DeliveryFailed, match="smaller"):
                await push(receiver.port).deliver(PART, encoded(8192))

    asyncio.run(scenario())


def test_memory_that_holds_something_else_by_now_is_found():
    async def scenario():
        async with desk() as (_, agent):
            reader = RemoteReader()
            async with agent.offer(encoded(1000).items[0].data) as (memory, _):
                assert await asyncio.to_thread(reader.read, memory, 256_000)
            async with agent.offer(encoded(1000, 1).items[0].data):
                with pytest.raises(ProtocolError, match="other bytes"):
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
