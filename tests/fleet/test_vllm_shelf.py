"""The connector's shared memory."""

from __future__ import annotations

import multiprocessing
import random

from encode_server.vllm.shelf import Entry, Shelf, read


def put(shelf: Shelf, name: str, data: bytes) -> bool:
    return shelf.put(name, "float32", (1, len(data) // 4), memoryview(data))


def got(entry: Entry) -> bytes:
    data = bytearray(entry.nbytes)
    read(entry, memoryview(data))
    return bytes(data)


def test_another_process_reads_what_was_put():
    shelf = Shelf(4096, 60)
    assert put(shelf, "a", b"abcd" * 10) and put(shelf, "b", b"wxyz" * 10)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(got, (shelf.get("b"),)) == b"wxyz" * 10
    shelf.close()
    shelf.close()


def test_entries_never_overlap_and_all_room_comes_back():
    shelf, dice, contents = Shelf(64 * 64, 0), random.Random(1), {}
    for number in range(2000):
        name, data = str(number), bytes([number % 251]) * (4 * dice.randrange(1, 200))
        assert put(shelf, name, data)
        contents[name] = data
        if number % 7 == 0:
            shelf.drop(dice.choice(list(contents)))
        contents = {name: data for name, data in contents.items() if name in shelf._entries}
        for other in dice.sample(sorted(contents), min(3, len(contents))):
            assert got(shelf._entries[other]) == contents[other]
    for name in contents:
        shelf.drop(name)
    assert shelf.bytes == 0 and put(shelf, "all", bytes(64 * 64)), "the holes have become one"
    shelf.close()


def test_what_is_too_large_is_refused():
    shelf = Shelf(1024, 0)
    assert not put(shelf, "a", bytes(1028)) and put(shelf, "b", bytes(1024))
    shelf.close()
