"""`EmbeddingReceiver` against real PUSH sockets."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
import torch
import zmq
from encode_standin import VALUES, stored

from encode_server.client import (
    ClientError,
    EmbeddingReceiver,
    EncodeServerError,
    ItemInfo,
    Modality,
    ProtocolError,
    ReceiverClosed,
)
from encode_server.wire.frames import EmbeddingHeader, ErrorInfo, encode_header

pytestmark = pytest.mark.anyio


class Pusher:
    """An encode server as the receiver sees it."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket

    def frames(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def part(
        self, req_id: str, part_idx: int = 0, num_parts: int = 1, *, dtype: str = "float32", rows: int = 3
    ) -> None:
        """`VALUES[:rows]`, its values raised by 10 x part_idx, as one item."""
        header = EmbeddingHeader(
            req_id=req_id,
            model="demo",
            modality=Modality.IMAGE,
            part_idx=part_idx,
            num_parts=num_parts,
            dtype=dtype,
            shape=(rows, 4),
            items=[ItemInfo(rows, None, f"sha256:{part_idx}")],
        )
        body = (VALUES[:rows] + 10 * part_idx).tobytes() if dtype == "float32" else stored(dtype)
        self.frames(encode_header(header), body)

    def error(self, req_id: str, part_idx: int = 0, num_parts: int = 1) -> None:
        info = ErrorInfo(400, "bad_media", "mm_items[0]: no image")
        header = EmbeddingHeader(req_id, "demo", Modality.IMAGE, part_idx, num_parts, error=info)
        self.frames(encode_header(header))


@pytest.fixture
def connect() -> Iterator[Callable[[EmbeddingReceiver], Pusher]]:
    """Makes pushers that are connected to a receiver."""
    with zmq.Context() as context:
        sockets = []

        def make(receiver: EmbeddingReceiver) -> Pusher:
            socket = context.socket(zmq.PUSH)
            socket.linger = 0
            socket.connect(f"tcp://{receiver.host}:{receiver.port}")
            sockets.append(socket)
            return Pusher(socket)

        yield make
        for socket in sockets:
            socket.close()


Connect = Callable[[EmbeddingReceiver], Pusher]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def kept(receiver: EmbeddingReceiver) -> tuple[int, int, int]:
    """Requests waited for, requests kept early, bytes kept early."""
    return len(receiver._waiting), len(receiver._early), receiver._early.held_bytes


async def test_parts_are_joined_in_their_order_whatever_order_they_come_in(connect: Connect) -> None:
    async with EmbeddingReceiver() as receiver:
        first, second = connect(receiver), connect(receiver)
        a = asyncio.create_task(receiver.receive("a"))
        b = asyncio.create_task(receiver.receive("b"))
        second.part("a", 2, 3, rows=1)
        first.part("b", 1, 2)
        first.part("a", 0, 3, rows=2)
        second.part("b", 0, 2)
        first.part("a", 1, 3)
        embedding = await a
        expected = np.concatenate([VALUES[:2], VALUES + 10, VALUES[:1] + 20])
        np.testing.assert_array_equal(embedding.numpy(), expected)
        assert embedding.shape == (6, 4)
        assert [(item.tokens, item.content_hash) for item in embedding.items] == [
            (2, "sha256:0"),
            (3, "sha256:1"),
            (1, "sha256:2"),
        ]
        assert (await b).shape == (6, 4)
        assert kept(receiver) == (0, 0, 0)


async def test_an_embedding_may_come_before_it_is_asked_for(connect: Connect) -> None:
    async with EmbeddingReceiver() as receiver:
        pusher = connect(receiver)
        pusher.part("early", 0, 2)
        await until(lambda: kept(receiver)[1] == 1)
        asked = asyncio.create_task(receiver.receive("early"))
        await asyncio.sleep(0)
        pusher.part("early", 1, 2)
        assert (await asked).shape == (6, 4)
        pusher.part("whole")
        await until(lambda: kept(receiver)[1] == 1)
        assert (await receiver.receive("whole", timeout=0.5)).shape == (3, 4)
        assert kept(receiver) == (0, 0, 0)


async def test_bfloat16_arrives_bit_for_bit_and_outlives_the_receiver(connect: Connect) -> None:
    async with EmbeddingReceiver() as receiver:
        connect(receiver).part("r", dtype="bfloat16")
        embedding = await receiver.receive("r")
    gc.collect()
    assert bytes(embedding.data) == stored("bfloat16")
    assert embedding.torch().dtype == torch.bfloat16
    assert torch.equal(embedding.torch().float(), torch.from_numpy(VALUES))
    np.testing.assert_array_equal(embedding.numpy(), VALUES)


async def test_running_out_of_time_says_what_had_come_and_keeps_nothing(connect: Connect) -> None:
    async with EmbeddingReceiver() as receiver:
        with pytest.raises(TimeoutError, match="nothing came for 'r'"):
            await receiver.receive("r", timeout=0.05)
        connect(receiver).part("r", 1, 3)
        await until(lambda: kept(receiver)[1] == 1)
        with pytest.raises(TimeoutError, match="1 of 3 parts came"):
            await receiver.receive("r", timeout=0.05)
        assert kept(receiver) == (0, 0, 0)


async def test_cancelling_keeps_nothing_and_the_same_request_can_be_tried_again(connect: Connect) -> None:
    async with EmbeddingReceiver() as receiver:
        pusher = connect(receiver)
        waiting = asyncio.create_task(receiver.receive("r"))
        pusher.part("r", 0, 2)
        await until(lambda: any(a.parts for a in receiver._waiting.values()))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert kept(receiver) == (0, 0, 0)
        pusher.part("r")
        assert (await receiver.receive("r")).shape == (3, 4)


async def test_a_failed_part_fails_the_request_without_waiting_for_the_others(connect: Connect) -> None:
    async with EmbeddingReceiver() as receiver:
        pusher = connect(receiver)
        pusher.part("r", 0, 3)
        pusher.error("r", 1, 3)
        with pytest.raises(EncodeServerError, match="no image") as caught:
            await receiver.receive("r", timeout=5)
        assert (caught.value.status, caught.value.code, caught.value.req_id) == (400, "bad_media", "r")
        assert kept(receiver) == (0, 0, 0)


async def test_a_part_sent_twice_counts_once(connect: Connect) -> None:
    async with EmbeddingReceiver() as receiver:
        pusher = connect(receiver)
        for part_idx in (0, 0, 1):
            pusher.part("r", part_idx, 2)
        assert (await receiver.receive("r")).shape == (6, 4)
        assert receiver.duplicates == 1


async def test_parts_that_do_not_belong_together_are_refused(connect: Connect) -> None:
    async with EmbeddingReceiver() as receiver:
        pusher = connect(receiver)
        pusher.part("dtypes", 0, 2)
        pusher.part("dtypes", 1, 2, dtype="float16")
        with pytest.raises(ProtocolError, match="differ"):
            await receiver.receive("dtypes")
        pusher.part("counts", 0, 2)
        pusher.part("counts", 2, 3)  # Dropped: it contradicts the first.
        pusher.part("counts", 1, 2)
        assert (await receiver.receive("counts")).shape == (6, 4)
        assert receiver.rejected == 1


async def test_frames_from_a_stranger_are_counted_and_change_nothing(connect: Connect) -> None:
    good = encode_header(EmbeddingHeader("r", "m", Modality.IMAGE, dtype="float32", shape=(1, 1)))

    def header(**changes: object) -> bytes:
        fields: dict[str, object] = {"req_id": "r", "model": "m", "modality": Modality.IMAGE, "dtype": "float32"}
        return encode_header(EmbeddingHeader(**(fields | {"shape": (1, 1)} | changes)))  # type: ignore[arg-type]

    bad = [
        (b"",),
        (b"hello",),
        (b"\x80", b"1234"),
        (b"\x81\xa1q" + b"\x91" * 100_000, b"1234"),
        (b"\x81\xa6req_id\xa2\xff\xfe", b"1234"),
        (good,),
        (good, b"123"),
        (good, b"1234", b""),
        (header(dtype="float64"), b"12345678"),
        (header(shape=(-1, -1)), b"1234"),
        (header(part_idx=1), b"1234"),
        (header(part_idx=-1), b"1234"),
        (header(num_parts=0), b"1234"),
        (header(num_parts=1 << 30), b"1234"),
        (header(version=2), b"1234"),
        (b"\xc6\x00\x50\x00\x00" + bytes(5 << 20), b"1234"),
    ]
    rng = np.random.default_rng(0)
    async with EmbeddingReceiver() as receiver:
        pusher = connect(receiver)
        waiting = asyncio.create_task(receiver.receive("wanted"))
        await asyncio.sleep(0)
        for frames in bad:
            pusher.frames(*frames)
        await until(lambda: receiver.rejected == len(bad))
        for _ in range(500):
            broken = bytearray(good)
            broken[rng.integers(len(broken))] = rng.integers(256)
            pusher.frames(bytes(broken), b"1234")
        pusher.part("wanted")
        assert (await waiting).shape == (3, 4)


async def test_a_header_without_a_version_or_with_new_fields_is_read(connect: Connect) -> None:
    header = {"req_id": "r", "model": "m", "modality": "image", "dtype": "float32", "shape": (1, 1)}
    async with EmbeddingReceiver() as receiver:
        pusher = connect(receiver)
        for added in ({}, {"version": 1, "of_a_later_release": [1]}):
            pusher.frames(msgspec.msgpack.encode(header | added), b"1234")
            assert (await receiver.receive("r", timeout=10)).shape == (1, 1)


async def test_what_nobody_asks_for_is_bounded_in_bytes(connect: Connect) -> None:
    async with EmbeddingReceiver(max_early_bytes=20_000) as receiver:
        pusher = connect(receiver)
        for i in range(200):
            pusher.part(f"r{i}")
        pusher.part("last")
        assert (await receiver.receive("last")).shape == (3, 4)
        assert 0 < kept(receiver)[2] <= 20_000
        assert (await receiver.receive("r199")).shape == (3, 4)
        with pytest.raises(TimeoutError):
            await receiver.receive("r0", timeout=0.05)


async def test_what_nobody_asks_for_is_forgotten_with_age(connect: Connect) -> None:
    async with EmbeddingReceiver(max_early_age=1) as receiver:
        connect(receiver).part("r")
        await until(lambda: kept(receiver)[1] == 1)
        await until(lambda: kept(receiver) == (0, 0, 0))


async def test_a_frame_above_the_limit_does_not_get_in(connect: Connect) -> None:
    async with EmbeddingReceiver(max_part_bytes=1000) as receiver:
        connect(receiver).part("large", rows=3, num_parts=1)
        assert (await receiver.receive("large")).shape == (3, 4)
        connect(receiver).frames(bytes(2000))
        other = connect(receiver)
        other.part("small")
        assert (await receiver.receive("small")).shape == (3, 4)
        assert receiver.rejected == 0


async def test_closing_wakes_whoever_waits(connect: Connect) -> None:
    receiver = EmbeddingReceiver()
    with pytest.raises(ReceiverClosed):
        await receiver.receive("r")
    async with receiver:
        waiting = asyncio.create_task(receiver.receive("r"))
        await asyncio.sleep(0)
    with pytest.raises(ReceiverClosed):
        await waiting
    with pytest.raises(ClientError):
        await receiver.receive("r")
    await receiver.aclose()
    async with receiver:  # It can be opened again.
        connect(receiver).part("r")
        assert (await receiver.receive("r")).shape == (3, 4)


async def test_an_address_in_use_and_a_second_waiter_are_refused() -> None:
    async with EmbeddingReceiver() as receiver:
        with pytest.raises(OSError, match=str(receiver.port)):
            async with EmbeddingReceiver(f"tcp://127.0.0.1:{receiver.port}"):
                pass
        waiting = asyncio.create_task(receiver.receive("r"))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="already"):
            await receiver.receive("r")
        waiting.cancel()
    with pytest.raises(ValueError, match="tcp://"):
        EmbeddingReceiver("ipc:///somewhere")


async def test_a_flood_does_not_keep_the_loop_from_others(connect: Connect) -> None:
    async with EmbeddingReceiver(max_early_bytes=1 << 20) as receiver:
        pusher = connect(receiver)
        for i in range(900):  # Fits the sockets' queues, so that all of it is there before anything is read.
            pusher.part(f"r{i}")
        time.sleep(0.2)  # noqa: ASYNC251 The messages come in while the loop can't take them.
        turns, deadline = 0, time.monotonic() + 20
        while kept(receiver)[2] < 900_000 and time.monotonic() < deadline:
            await asyncio.sleep(0)
            turns += 1
        assert turns > 100 and kept(receiver)[2] >= 900_000
