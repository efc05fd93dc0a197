"""Preparers with a real forkserver and stand-in processes: what the tests of this folder work with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec

from encode_server.engine.arena import Arena
from encode_server.prepare.preparers import Preparers, PreparerSpec
from encode_server.runtime.forkserver import Forkserver
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality
from encode_server.wire.preparers import PreparedItem, PreparerSetup
from tests.pipeline.desk import settle, until


class Kitchen:
    """What a test holds. `asked`: the items for which room was asked."""

    def __init__(self, at: Preparers, arena: Arena, forkserver: Forkserver, metrics: Metrics, tmp: Path) -> None:
        self.preparers, self.arena, self.forkserver, self.metrics, self.tmp = at, arena, forkserver, metrics, tmp
        self.asked: list[PreparedItem] = []

    async def prepare(
        self,
        media: str,
        *,
        modality: Modality = Modality.IMAGE,
        express: bool = False,
        then: Callable[[PreparedItem], Awaitable[None]] | None = None,
    ) -> bytes:
        """The tensor of an item, read from the arena. `then` is called when room is asked for."""
        slots = []

        async def room(item: PreparedItem) -> int:
            self.asked.append(item)
            if then is not None:
                await then(item)
            if not slots:
                slots.extend(await self.arena.acquire([item.nbytes]))
            return slots[0].offset

        try:
            item = await self.preparers.prepare(
                modality, media.encode(), ItemOptions(), max_cost=1000, room=room, express=express
            )
            size = item.pieces[0].tensors[0].shape[0]
            return bytes(self.arena.view(slots[0].offset, size))
        finally:
            self.arena.release(*slots)

    def begin(self, media: str, **options: object) -> asyncio.Task[bytes]:
        """`prepare`, in a task."""
        return asyncio.create_task(self.prepare(media, **options))  # type: ignore[arg-type]

    def gate(self, name: str = "gate") -> Gate:
        """Something to wait for, as `wait:PATH`."""
        return Gate(self.tmp / name)

    @property
    def pid(self) -> int:
        """The first process."""
        pid = self.preparers.pids[0]
        assert pid is not None
        return pid

    def signal(self, signum: signal.Signals) -> None:
        """Send the first process a signal."""
        os.kill(self.pid, signum)

    def shift_back(self, media: str, seconds: float) -> None:
        """Have the preparation of `media` have begun so much earlier."""
        for process in self.preparers._processes.values():
            for job in process.jobs.values():
                if job.media == media.encode():
                    job.began -= seconds


class Gate:
    """A file for which an item waits in its preparer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun = Path(f"{path}.begun")

    def __str__(self) -> str:
        return f"wait:{self.path}"

    async def reached(self) -> None:
        """Return once an item waits, and forget that."""
        await until(self._begun.exists)
        self._begun.unlink()

    def open(self) -> None:
        """Let every item pass, from now on."""
        self.path.touch()


@contextlib.asynccontextmanager
async def kitchen(tmp: Path, processes: int = 1, threads: int = 2, decode_s: float = 30.0) -> AsyncIterator[Kitchen]:
    """Preparers that are ready. In the end none of their processes is left."""
    arena, metrics = Arena(1 << 20), Metrics()
    forkserver = Forkserver("tests.prepare.setup:nothing")
    forkserver.start()
    keeper = asyncio.create_task(forkserver.run())
    setup = PreparerSetup("", str(tmp), "stand-in", msgspec.Raw(b"\xc0"), 1000, threads, 1 << 30, arena.size)
    at = Preparers(PreparerSpec(processes, threads, decode_s, setup), forkserver, arena.fd, metrics)
    running = asyncio.create_task(at.run())
    try:
        ready = asyncio.create_task(at.wait_ready())
        await asyncio.wait((ready, running), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            ready.cancel()
            await running
        await until(lambda: "starting" not in at.states)
        yield Kitchen(at, arena, forkserver, metrics, tmp)
    finally:
        pids = [pid for pid in at.pids if pid is not None]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await settle()
        assert arena.used == 0
        assert not any(map(_exists, pids))
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        arena.close()


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
