"""A batcher over stand-in ranks and a small arena: what the tests of the batcher work with."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from encode_server.pipeline.batcher import Batcher
from encode_server.pipeline.jobs import Job
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.layout import aligned
from encode_server.wire.modality import Modality
from encode_server.wire.preparers import PreparedItem, PreparedPiece, TensorPart
from encode_server.wire.ranks import ItemRef
from tests.pipeline.engine_standin import DIM, Batch, StandInEngine, StandInGroups, WatchedArena


def prepared(*costs: int) -> PreparedItem:
    """An item of one piece for each cost: as many tokens, and a float32 tensor of as many numbers."""
    pieces, offset = [], 0
    for cost in costs:
        pieces.append(PreparedPiece((TensorPart("x", "float32", (cost,), offset),), cost, cost, 0))
        offset += aligned(4 * cost)
    return PreparedItem(tuple(pieces), offset, None, {})


class Desk:
    """What a test holds: the groups of ranks (`engine` is the first), the batcher, and the jobs by name."""

    def __init__(
        self,
        groups: list[StandInEngine],
        batcher: Batcher,
        arena: WatchedArena,
        metrics: Metrics,
        running: asyncio.Task[None],
    ) -> None:
        self.groups, self.engine = groups, groups[0]
        self.batcher, self.arena, self.metrics = batcher, arena, metrics
        self.running = running
        self.jobs: dict[str, Job] = {}

    async def submit(
        self,
        name: str,
        *costs: int,
        modality: Modality = Modality.IMAGE,
        client: str = "",
        reserved: bool = False,
        deadline_s: float = 60.0,
        group: int | None = None,
    ) -> Job:
        """Queue a job of one piece for each cost."""
        deadline = time.monotonic() + deadline_s
        job = Job(self.arena, modality, deadline, client=client, reserved=reserved, group=group)
        await job.acquire(prepared(*costs), DIM, "float32")
        self.jobs[name] = job
        self.batcher.submit(job)
        return job

    def names(self, batch: Batch) -> list[str]:
        """Whose pieces a batch holds."""
        return [self._name(item) for item in batch.items]

    @property
    def sent(self) -> list[list[str]]:
        """Every batch that the first group was sent so far."""
        return self.sent_to(0)

    def sent_to(self, group: int) -> list[list[str]]:
        """Every batch that the group was sent so far."""
        return [self.names(batch) for batch in self.groups[group].batches]

    async def ended(self, name: str) -> str:
        """`ok`, or the error's code, once the job has ended. Its room is given back."""
        job = self.jobs[name]
        try:
            async with asyncio.timeout(5):
                await job.finished
        except Exception as error:
            return getattr(error, "code", repr(error))
        finally:
            job.release()
        return "ok"

    async def all_ended(self) -> dict[str, str]:
        """`ended` of every job."""
        return {name: await self.ended(name) for name in self.jobs}

    def _name(self, item: ItemRef) -> str:
        return next(name for name, job in self.jobs.items() if any(piece.item is item for piece in job.pieces))


@contextlib.asynccontextmanager
async def desk(
    budget: int = 100, *, at_once: int = 1, batch_cost: int | None = None, arena_bytes: int = 1 << 20, groups: int = 1
) -> AsyncIterator[Desk]:
    """A batcher that runs. In the end everything must have been given back."""
    engine = StandInGroups(groups, at_once=at_once, batch_cost=batch_cost)
    arena, metrics = WatchedArena(arena_bytes, engine.groups), Metrics(groups=groups)
    batcher = Batcher(engine, dict.fromkeys(Modality, budget), metrics)
    running = asyncio.create_task(batcher.run())
    try:
        yield Desk(engine.groups, batcher, arena, metrics, running)
        for group in engine.groups:
            if group.over is None:
                await group.wait_ready()
        await settle()
        assert not arena.violations, "a slot was released while ranks may touch it"
        assert arena.used == 0, "something was not given back"
    finally:
        running.cancel()
        (result,) = await asyncio.gather(running, return_exceptions=True)
        arena.close()
    if isinstance(result, Exception):
        raise result


async def settle() -> None:
    """Let every task that can go on go on."""
    for _ in range(50):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - whatever makes it true announces nothing
            await asyncio.sleep(0.001)
