"""What is told of ranks that are lost: whether the forward may be to blame, or somebody outside of the server."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from encode_server.engine import group
from encode_server.engine.arena import Arena
from encode_server.engine.group import GroupLost, GroupSpec, RankGroup
from encode_server.runtime.forkserver import Forkserver
from encode_server.wire.modality import Modality
from tests.pipeline.desk import until


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
    monkeypatch.setattr(group, "oom_kills", lambda: next(counts))
    monkeypatch.setattr("encode_server.runtime.outside.oom_kills", lambda: next(counts))

    async def scene() -> None:
        forkserver, arena = Forkserver("tests.runtime.children:nothing"), Arena(1 << 20)
        forkserver.start()
        keeper = asyncio.create_task(forkserver.run())
        spec = GroupSpec("", 1, "cpu", "float32", "float32", 1)
        ranks = RankGroup(spec, forkserver, arena, lambda rank, step: None, lambda rank, text: None)
        try:
            await ranks.start(30)
            forward = asyncio.create_task(ranks.forward(Modality.IMAGE, ()))
            await until(lambda: ranks.oldest() is not None)
            pid = ranks._ranks[0].peer.pid
            assert pid is not None
            os.kill(pid, signum)
            with pytest.raises(GroupLost) as lost:
                await forward
            assert lost.value.suspect and lost.value.outside is outside
        finally:
            await ranks.stop()
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            arena.close()

    asyncio.run(scene())
