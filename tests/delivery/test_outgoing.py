"""Registered memory for embeddings on their way: who holds a view holds the room, and the room comes back once."""

from __future__ import annotations

import gc
import random
import threading

import numpy as np
import pytest

from encode_server.delivery.outgoing import Outgoing, address_of
from encode_server.wire.embedding import Encoded, EncodedItem, releasing
from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality

KIB = 1 << 10


def filled(nbytes: int, value: int = 1) -> memoryview:
    return memoryview(bytes([value]) * nbytes)


def encoded(*values: bytes) -> Encoded:
    items = [EncodedItem(ItemInfo(len(each) // 4, None, "sha256:0"), {}, memoryview(each)) for each in values]
    return Encoded(Modality.IMAGE, "m", "float32", 1, items)


@pytest.fixture
def full() -> list[int]:
    return []


@pytest.fixture
def room(full) -> Outgoing:
    return Outgoing(64 * KIB, lambda: full.append(1))


def test_pieces_lie_one_after_another_in_its_memory(room):
    data = room.copy(filled(300, 1), filled(500, 2))
    assert bytes(data) == bytes(filled(300, 1)) + bytes(filled(500, 2))
    assert room.holds(data) and room.holds(data[100:]) and not room.holds(filled(10))
    assert room.address <= address_of(data) < room.address + room.max_bytes


def test_the_room_comes_back_when_the_last_view_dies(room):
    data = room.copy(filled(KIB))
    views = [data[10:], np.frombuffer(data, np.uint8), memoryview(data).cast("I")]
    del data
    for _ in range(3):
        assert room.used_bytes == KIB
        views.pop()
    assert room.used_bytes == 0


def test_a_released_view_holds_nothing_whoever_refers_to_it(room):
    kept = []
    with releasing(room.copy(filled(KIB))) as data:
        kept.append(data)
    assert room.used_bytes == 0 and kept


def test_a_released_view_that_somebody_reads_from_keeps_its_room(room):
    with releasing(room.copy(filled(KIB, 7))) as data:
        reader = np.frombuffer(data, np.uint8)
    assert room.used_bytes == KIB and reader.sum() == 7 * KIB
    del reader, data
    assert room.used_bytes == 0


def test_what_finds_no_room_is_told_and_leaves_nothing(room, full):
    data = room.copy(filled(40 * KIB))
    assert room.copy(filled(40 * KIB)) is None and room.copy(filled(65 * KIB)) is None
    assert full == [1, 1] and room.used_bytes == 40 * KIB
    del data
    assert room.copy(filled(64 * KIB)) is not None


def test_room_in_pieces_comes_together_again(room, full):
    held = [room.copy(filled(16 * KIB, number)) for number in range(4)]
    held[0] = held[2] = None
    assert room.used_bytes == 32 * KIB and room.copy(filled(32 * KIB)) is None
    assert bytes(held[1]) == bytes(filled(16 * KIB, 1)) and bytes(held[3]) == bytes(filled(16 * KIB, 3))
    held.clear()
    assert room.copy(filled(64 * KIB)) is not None and full == [1]


def test_views_may_die_in_any_thread_and_during_a_collection(room):
    def churn(seed: int) -> None:
        choose, held = random.Random(seed), []
        for number in range(150):
            value = (seed * 31 + number) % 256
            if (data := room.copy(filled(choose.randint(1, 9000), value))) is not None:
                held.append((value, data))
            while len(held) > 3:
                value, data = held.pop(choose.randrange(len(held)))
                if bytes(data) != bytes(filled(data.nbytes, value)):
                    wrong.append(value)
                if choose.random() < 0.5:
                    cycle = [data]
                    cycle.append(cycle)  # only a collection ends it, in whichever thread
            if number % 50 == 0:
                gc.collect()

    wrong: list[int] = []
    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    gc.collect()
    assert not wrong and room.used_bytes == 0
    assert room.copy(filled(64 * KIB)) is not None  # every hole has merged


def test_an_embedding_is_copied_there_once(room, full):
    one = encoded(bytes(filled(KIB, 3)))
    first = one.contiguous(room)
    assert room.holds(first) and bytes(first) == bytes(filled(KIB, 3))
    there = encoded(bytes(filled(KIB)))
    there.items[0] = EncodedItem(there.items[0].info, {}, first)
    assert address_of(there.contiguous(room)) == address_of(first) and room.used_bytes == KIB
    several = encoded(bytes(filled(KIB, 1)), bytes(filled(KIB, 2)))
    assert bytes(several.contiguous(room)) == bytes(several.contiguous()) and not room.holds(several.contiguous())
    large = encoded(bytes(65 * KIB))
    assert not room.holds(large.contiguous(room)) and full == [1]
    for each in (one, large):
        with releasing(each.contiguous()):
            pass
        assert bytes(each.items[0].data[:1])  # the item's own view is as it was


def test_an_embedding_of_nothing_takes_no_room(room, full):
    assert room.copy(memoryview(b"")) is None and not room.holds(memoryview(b"")) and not full
