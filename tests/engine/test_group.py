"""What is told of ranks that are lost: whether the forward may be to blame, or somebody outside of the server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from encode_server.engine import group
from encode_server.engine.arena import Arena
from encode_server.engine.group import GroupLost, GroupSpec, RankGroup, _Rank
from encode_server.runtime.forkserver import Forkserver
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import DeviceMemory, Done
from tests.engine.fake_rank import MEMORY
from tests.engine.group_standin import INFO
from tests.pipeline.desk import until


@contextlib.asynccontextmanager
async def fake_ranks(device: str = "cpu") -> AsyncIterator[RankGroup]:
    """A group of one rank, a process that does without torch."""
    forkserver, arena = Forkserver("tests.runtime.children:nothing"), Arena(1 << 20)
    forkserver.start()
    keeper = asyncio.create_task(forkserver.run())
    spec = GroupSpec("", 1, device, "float32", "float32", 1)
    ranks = RankGroup(spec, forkserver, arena, lambda rank, step: None, lambda rank, text: None)
    try:
        await ranks.start(30)
        yield ranks
    finally:
        await ranks.stop()
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        arena.close()


@pytest.mark.parametrize(
    ("signum", "oom_kills", "outside"),
    [
        (signal.SIGKILL, [3, 3], True),
        (signal.SIGKILL, [3, 4], False),
        (signal.SIGSEGV, [3, 3], False),
    ],
)
def test_a_signal_that_neither_the_server_nor_the_kernel_sent_came_from_outside(
    signum: signal.Signals, oom_kills: list[int], outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "ENTRY", "tests.engine.fake_rank:main")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    counts = iter(oom_kills)
    monkeypatch.setattr(group.OomKills, "count", lambda self: next(counts))

    async def scene() -> None:
        async with fake_ranks() as ranks:
            forward = asyncio.create_task(ranks.forward(Modality.IMAGE, ()))
            await until(lambda: ranks.oldest() is not None)
            pid = ranks._ranks[0].peer.pid
            assert pid is not None
            os.kill(pid, signum)
            with pytest.raises(GroupLost) as lost:
                await forward
            assert lost.value.suspect and lost.value.outside is outside

    asyncio.run(scene())


@pytest.mark.parametrize(("device", "memory"), [("cpu", None), ("cuda", MEMORY)])
def test_what_a_rank_says_of_its_devices_memory_is_kept_until_the_ranks_go(
    device: str, memory: DeviceMemory | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "ENTRY", "tests.engine.fake_rank:main")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    async def scene() -> None:
        async with fake_ranks(device) as ranks:
            assert ranks.memory == [None]
            await ranks.ping()
            assert ranks.memory == [memory]
        assert ranks.memory == []

    asyncio.run(scene())


@pytest.mark.parametrize(("computing", "age_s"), [(1, 0.0), (2, 40.0)])
def test_time_behind_another_forward_on_one_stream_is_not_the_forwards_own(
    computing: int, age_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a short batch behind a long one would be taken for a hang."""
    clock = [100.0]
    monkeypatch.setattr(group, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    async def scene() -> None:
        nobody = cast(Any, None)
        spec = GroupSpec("", 1, "cpu", "float32", "float32", 1)
        ranks = RankGroup(spec, nobody, nobody, lambda rank, step: None, lambda rank, text: None)
        peer = SimpleNamespace(pid=None, link=SimpleNamespace(send=lambda frame: None))
        ranks._ranks.append(_Rank(cast(Any, peer), info=msgspec.structs.replace(INFO, at_once=2, computing=computing)))
        long, short = (asyncio.create_task(ranks.forward(Modality.IMAGE, ())) for _ in range(2))
        await asyncio.sleep(0)
        clock[0] += 40
        ranks._acknowledge(Done(0, 1))
        await long
        oldest = ranks.oldest()
        assert oldest is not None and ranks.age_s(oldest) == age_s
        ranks.fail("rank 0 exited", group.Cause.DIED)
        with pytest.raises(GroupLost) as lost:
            await short
        assert lost.value.suspect

    asyncio.run(scene())
