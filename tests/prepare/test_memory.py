"""Decodes wait for memory in the order in which they came."""

from __future__ import annotations

import time
from threading import Event, Thread

from encode_server.prepare.memory import DecodeMemory


class Decode(Thread):
    """Holds memory until `finish`."""

    def __init__(self, memory: DecodeMemory, nbytes: int) -> None:
        super().__init__(daemon=True)
        self._memory, self._nbytes = memory, nbytes
        self.waits, self.holds, self.may_end = Event(), Event(), Event()
        self.start()

    def run(self) -> None:
        with self._memory.hold(self._nbytes, self.waits.set, lambda: None):
            self.holds.set()
            self.may_end.wait(20)

    def finish(self) -> None:
        self.may_end.set()
        self.join(20)


def test_a_large_decode_is_not_overtaken_by_small_ones() -> None:
    memory = DecodeMemory(200)  # half of it for decodes
    first = Decode(memory, 60)
    assert first.holds.wait(20)
    large = Decode(memory, 100)
    assert large.waits.wait(20)
    small = Decode(memory, 10)  # there is room for it now, but then there would never be room for the large one
    assert small.waits.wait(20)
    first.finish()
    assert large.holds.wait(20) and not small.holds.is_set()
    large.finish()
    assert small.holds.wait(20)
    small.finish()


def test_all_that_fit_begin_when_a_large_decode_ends() -> None:
    memory = DecodeMemory(200)
    large = Decode(memory, 1000)  # more than there is: alone
    assert large.holds.wait(20)
    others = []
    for _ in range(3):
        others.append(Decode(memory, 30))
        assert others[-1].waits.wait(20)
    large.finish()
    end = time.monotonic() + 20
    for other in others:
        assert other.holds.wait(end - time.monotonic())
    for other in others:
        other.finish()
