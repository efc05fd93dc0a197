"""`RemoteReader` in the hands of a stand-in for NIXL, whose transfers can hang."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import zmq

from encode_server.client import EmbeddingReceiver, remote
from encode_server.client import receiver as receiver_module
from encode_server.client.errors import ProtocolError
from encode_server.client.remote import MAX_KEPT, RemoteReader
from encode_server.vllm.inbox import Inbox
from encode_server.vllm.shelf import Shelf
from encode_server.wire.frames import EmbeddingHeader, RemoteMemory, encode_header
from encode_server.wire.modality import Modality
from tests.live import eventually

CONTENT = bytes(range(64))
MEMORY = RemoteMemory("server", b"agent", 4096, b"tag", zlib.crc32(CONTENT))


class Nixl:
    """An agent. While `hangs`, transfers neither end nor can be released, as with NIXL's own."""

    def __init__(self) -> None:
        self.hangs = False
        self.deregisters = True
        self.released = 0
        self.registered: set[int] = set()
        self.servers: set[str] = set()

    def add_remote_agent(self, agent: bytes) -> bytes:
        self.servers.add(agent.decode())
        return agent

    def remove_remote_agent(self, name: str) -> None:
        self.servers.remove(name)

    def register_memory(self, descs: list, kind: str) -> int:
        self.registered.add(descs[0][0])
        return descs[0][0]

    def deregister_memory(self, address: int) -> None:
        if not self.deregisters:
            raise RuntimeError("NIXL_ERR_BACKEND")
        self.registered.remove(address)

    def get_xfer_descs(self, descs: list, kind: str) -> list:
        return descs

    def initialize_xfer(self, operation: str, near: list, far: list, server: str, tag: bytes) -> list:
        return near

    def transfer(self, near: list) -> str:
        if self.hangs:
            return "PROC"
        ctypes.memmove(near[0][0], CONTENT, near[0][1])
        return "DONE"

    def check_xfer_state(self, near: list) -> str:
        return "PROC"

    def release_xfer_handle(self, near: list) -> None:
        if self.hangs:
            raise RuntimeError("NIXL_ERR_REPOST_ACTIVE")
        self.released += 1


@pytest.fixture
def agents(monkeypatch) -> list[Nixl]:
    """The agents that are made."""
    made: list[Nixl] = []

    def types() -> tuple:
        return (lambda name, config: made.append(Nixl()) or made[-1]), lambda **options: None

    monkeypatch.setattr(remote, "agent_types", types)
    monkeypatch.setattr(receiver_module, "agent_types", types, raising=False)
    return made


def test_a_read_gives_everything_back(agents):
    reader = RemoteReader()
    assert bytes(reader.read(MEMORY, 64)) == CONTENT
    assert agents[0].released == 1 and not agents[0].registered and agents[0].servers == {"agent"}
    reader.close()
    assert not agents[0].servers
    with pytest.raises(ProtocolError, match="closed"):
        reader.read(MEMORY, 64)


def test_room_stays_as_long_as_a_transfer_may_write_into_it(agents, monkeypatch):
    rooms = []
    empty = np.empty

    def note(*args: object) -> np.ndarray:
        room = empty(*args)
        rooms.append(weakref.ref(room))
        return room

    reader = RemoteReader(timeout_s=0.01)
    agents[0].hangs = True
    with monkeypatch.context() as noted:
        noted.setattr(np, "empty", note)
        with pytest.raises(ProtocolError, match="not read from server: PROC"):
            reader.read(MEMORY, 64)
    gc.collect()  # the error's traceback holds the room as well
    assert rooms[0]() is not None and agents[0].registered
    agents[0].hangs = False
    assert bytes(reader.read(MEMORY, 64)) == CONTENT
    assert rooms[0]() is None and not agents[0].registered and agents[0].released == 2


def test_memory_whose_transfer_was_released_is_deregistered_apart(agents):
    reader = RemoteReader()
    agents[0].deregisters = False
    assert bytes(reader.read(MEMORY, 64)) == CONTENT
    agents[0].deregisters = True
    reader.close()
    assert not agents[0].registered and agents[0].released == 1


def test_transfers_that_hang_take_bounded_memory(agents):
    reader = RemoteReader(timeout_s=0.001)
    agents[0].hangs = True
    for _ in range(MAX_KEPT):
        with pytest.raises(ProtocolError, match="not read"):
            reader.read(MEMORY, 64)
    with pytest.raises(ProtocolError, match="transfers hang"):
        reader.read(MEMORY, 64)
    assert len(agents[0].registered) == MAX_KEPT


def test_closing_ends_a_read_in_progress(agents):
    reader = RemoteReader(timeout_s=60)
    agents[0].hangs = True
    failures = []

    def read() -> None:
        try:
            reader.read(MEMORY, 64)
        except ProtocolError as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert eventually(lambda: agents[0].registered)
    began = time.monotonic()
    reader.close()
    thread.join(10)
    assert failures and time.monotonic() - began < 10


@pytest.fixture
def connected() -> Iterator[Callable[[str], zmq.Socket[bytes]]]:
    """Makes sockets that push to an endpoint."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def connect(endpoint: str) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.PUSH)
        socket.connect(endpoint)
        return socket

    yield connect
    context.destroy(linger=0)


def announced(req_id: str) -> list[bytes]:
    """The frames of an embedding that is to be read."""
    header = EmbeddingHeader(req_id, "m", Modality.IMAGE, dtype="float32", shape=(4, 4), version=2, memory=MEMORY)
    return [encode_header(header)]


def test_vllms_inbox_goes_on_after_a_message_that_fails(agents, connected):
    shelf = Shelf(1 << 20, 60)
    inbox = Inbox("tcp://127.0.0.1:0", shelf, 1 << 20, nixl=True)
    inbox._reader._timeout_s = 0.01
    socket = connected(inbox.endpoint)
    try:
        agents[0].hangs = True
        socket.send_multipart(announced("late"))
        assert eventually(lambda: agents[0].registered)
        agents[0].hangs = False
        socket.send_multipart(announced("next"))
        assert eventually(lambda: inbox.received == 1)

        put, shelf.put = shelf.put, None  # type: ignore[method-assign,assignment]
        socket.send_multipart(announced("broken"))
        assert eventually(lambda: inbox.failed == 1)
        shelf.put = put  # type: ignore[method-assign]
        socket.send_multipart(announced("last"))
        assert eventually(lambda: inbox.received == 2)
    finally:
        inbox.close()
        shelf.close()
    assert not inbox._thread.is_alive() and not agents[0].servers


def test_a_receiver_gives_its_agent_back_and_may_be_opened_again(agents, connected):
    async def scenario() -> None:
        receiver = EmbeddingReceiver(nixl=True)
        assert not agents, "nothing is held before the receiver is entered"
        for name in ("first", "second"):
            async with receiver:
                connected(f"tcp://127.0.0.1:{receiver.port}").send_multipart(announced(name))
                assert bytes((await receiver.receive(name, timeout=20)).data) == CONTENT
            assert not agents[-1].servers and not agents[-1].registered
        async with receiver:
            agents[-1].hangs = True
            connected(f"tcp://127.0.0.1:{receiver.port}").send_multipart(announced("hangs"))
            async with asyncio.timeout(20):
                while not agents[-1].registered:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        assert not receiver._tasks and not agents[-1].servers
        assert eventually(lambda: not any(thread.name.startswith("nixl") for thread in threading.enumerate()))

    asyncio.run(scenario())
