"""A process that stays after SIGKILL (its driver hangs) is found within seconds, and nothing goes on beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import zmq

from encode_server.engine.group import GroupSpec, RankGroup
from encode_server.runtime import peer as peers
from encode_server.runtime.peer import Peer, Unkillable


class Undead:
    """A child process that no signal ends."""

    pid = 1 << 30

    def __init__(self, *, dies: bool = False) -> None:
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._dies = dies
        self.kills = 0

    def kill(self) -> None:
        self.kills += 1
        if self._dies and not self.exited.done():
            self.exited.set_result(-9)


class Undertaker:
    """A forkserver whose children are `make`'s."""

    def __init__(self, make: Callable[[int], Undead]) -> None:
        self.children: list[Undead] = []
        self._make = make

    async def fork(self, name: str, entry: str, argument: bytes, fds: Sequence[int]) -> Undead:
        self.children.append(self._make(len(self.children)))
        return self.children[-1]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "STUCK_S", 0.02)


def test_a_process_that_cannot_be_killed_is_told() -> None:
    async def scenario() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        peer = Peer(context, lambda frames: None)
        undertaker = Undertaker(lambda index: Undead())
        await peer.start(cast(Any, undertaker), "rank 0", "", b"", ())
        with pytest.raises(Unkillable, match=f"process {Undead.pid} cannot be killed"):
            await peer.close()
        assert undertaker.children[0].kills
        context.term()  # would wait for a socket that is still open

    asyncio.run(scenario())


def test_the_others_of_its_group_are_ended_and_the_group_never_counts_as_gone() -> None:
    async def scenario() -> None:
        undertaker = Undertaker(lambda index: Undead(dies=index != 1))
        arena = cast(Any, type("Arena", (), {"size": 0, "fd": 0}))
        spec = GroupSpec("", 3, "cpu", "float32", "float32", 1)
        group = RankGroup(spec, cast(Any, undertaker), arena, lambda *_: None, lambda *_: None)
        starting = asyncio.create_task(group.start(60.0))
        while len(undertaker.children) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        with pytest.raises(Unkillable):
            await group.stop()
        assert [child.exited.done() for child in undertaker.children] == [True, False, True]
        assert not group.gone.done()
        await asyncio.gather(starting, return_exceptions=True)

    asyncio.run(scenario())
