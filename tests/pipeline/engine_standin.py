"""Ranks that do what a test tells them to, for whoever only needs an `Engine`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from encode_server.engine.arena import Arena
from encode_server.engine.group import GroupLost
from encode_server.engine.region import Slot
from encode_server.runtime.changes import Changes
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import Done, EncoderInfo, ItemRef

DIM = 4


@dataclass(eq=False)
class Batch:
    """One forward that the ranks were sent."""

    modality: Modality
    items: tuple[ItemRef, ...]
    expected_s: float | None
    outcome: asyncio.Future[list[Done]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def open(self) -> bool:
        """Whether the ranks have not ended the forward."""
        return not self.outcome.done()

    def end(self, error: str = "", *, out_of_memory: bool = False, forward_s: float = 0.01) -> None:
        """Have the ranks acknowledge the forward."""
        self.outcome.set_result([Done(0, 0, error, out_of_memory, forward_s)])


class StandInEngine:
    """One group of ranks, and an engine of that group alone. With `rule` None a test ends each batch by hand; else
    `rule` says of each batch how it ends: Done with nothing or an error, or GroupLost, from which the ranks recover
    immediately.
    """

    def __init__(self, *, at_once: int = 1, batch_cost: int | None = None, changes: Changes | None = None) -> None:
        dims = dict.fromkeys(Modality, DIM)
        self.info: EncoderInfo | None = EncoderInfo(
            "stand-in", dims, "float32", "cpu", 0, at_once, batch_cost, computing=at_once
        )
        self.ready = self.loaded = True
        self.groups = [self]
        self.batches: list[Batch] = []
        self.rule: Callable[[Batch], Done | GroupLost] | None = None
        self.over: str | None = None  # why the ranks never come back
        self._unreaped: dict[Batch, GroupLost] = {}  # lost, and their ranks may still run
        self._changes = changes or Changes()

    @property
    def open(self) -> list[Batch]:
        """Forwards in progress, in the order sent."""
        return [batch for batch in self.batches if batch.open and batch not in self._unreaped]

    async def wait_ready(self) -> EncoderInfo:
        """As `RankGroups.wait_ready`."""
        while not self.ready:
            if self.over is not None:
                raise GroupLost(self.over)
            await self._changes.wait()
        assert self.info is not None
        return self.info

    async def changed(self) -> None:
        """As `RankGroups.changed`."""
        await self._changes.wait()

    async def forward(
        self, modality: Modality, items: tuple[ItemRef, ...], expected_s: float | None = None
    ) -> list[Done]:
        """As `Supervisor.forward`."""
        if not self.loaded:
            raise GroupLost("the ranks were lost before")
        batch = Batch(modality, items, expected_s)
        self.batches.append(batch)
        if self.rule is not None:
            match self.rule(batch):
                case Done() as done:
                    batch.outcome.set_result([done])
                case GroupLost() as lost:
                    self.lose(suspect=lost.suspect, out_of_memory=lost.out_of_memory, outside=lost.outside)
                    asyncio.get_running_loop().call_later(0.001, self.recover)
        return await asyncio.shield(batch.outcome)

    def lose(self, *, suspect: bool = True, out_of_memory: bool = False, outside: bool = False) -> None:
        """The ranks are lost with everything in progress. Until they are reaped they may still write to the arena.
        `suspect`: of the oldest forward; the others were not being executed."""
        self.ready = self.loaded = False
        for index, batch in enumerate(self.open):
            first = index == 0
            self._unreaped[batch] = GroupLost(
                "the test wants it",
                suspect=suspect and first,
                out_of_memory=out_of_memory and first,
                outside=outside,
            )
        self._changes.announce()

    def reap(self) -> None:
        """The lost ranks are gone."""
        for batch, lost in self._unreaped.items():
            batch.outcome.set_exception(lost)
        self._unreaped.clear()

    def recover(self) -> None:
        """The lost ranks are gone, and others are ready."""
        self.reap()
        self.ready = self.loaded = True
        self._changes.announce()

    def give_up(self, reason: str) -> None:
        """The ranks are gone and never come back."""
        self.lose(suspect=False)
        self.reap()
        self.over = reason
        self._changes.announce()

    def touches(self, slot: Slot) -> bool:
        """Whether ranks may read or write the slot."""
        for batch in self.batches:
            for item in batch.items if batch.open else ():
                for tensor in (*item.inputs, item.output):
                    if slot.offset <= tensor.offset < slot.offset + slot.size:
                        return True
        return False


class StandInGroups:
    """Several groups of ranks, as `RankGroups`."""

    def __init__(self, count: int, *, at_once: int = 1, batch_cost: int | None = None) -> None:
        self._changes = Changes()
        self.groups = [
            StandInEngine(at_once=at_once, batch_cost=batch_cost, changes=self._changes) for _ in range(count)
        ]

    @property
    def info(self) -> EncoderInfo | None:
        """What each group has loaded."""
        return self.groups[0].info

    @property
    def over(self) -> str | None:
        """Why no group comes back."""
        return self.groups[0].over if all(group.over for group in self.groups) else None

    async def changed(self) -> None:
        """Return when a group's state changes."""
        await self._changes.wait()


class WatchedArena(Arena):
    """An arena that counts violations of the invariant: no slot goes back while ranks may touch it."""

    def __init__(self, size: int, groups: Sequence[StandInEngine]) -> None:
        super().__init__(size, reserve=64 << 10)
        self._groups = groups
        self.watched = True
        self.violations = 0  # an exception might be lost with the task that releases

    def release(self, *slots: Slot) -> None:
        """Give slots back."""
        self.violations += self.watched and any(group.touches(slot) for group in self._groups for slot in slots)
        super().release(*slots)
