"""A group of ranks without processes, for the supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from encode_server.engine.arena import Arena
from encode_server.engine.group import Cause, GroupLost, GroupSpec, Pending
from encode_server.errors import StartupError
from encode_server.runtime.forkserver import Forkserver
from encode_server.runtime.peer import Unkillable
from encode_server.wire import ranks as m
from encode_server.wire.modality import Modality

INFO = m.EncoderInfo("stand-in", dict.fromkeys(Modality, 4), "float32", "cpu", 0)


class StandInGroup:
    """As much of a RankGroup as the supervisor uses. `ages`: what `age_s` says, whatever the clock says."""

    def __init__(self, groups: Groups, index: int) -> None:
        self._groups, self.index = groups, index
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.states, self.pids, self.memory = ["ready"], [1], [None]
        self.forwarded = 0
        self.cause = Cause.NOT_STARTED
        self.age = 0.0
        self.pending: list[Pending] = []
        self.stopped = self.halted = False

    def oldest(self) -> Pending | None:
        return self.pending[0] if self.pending else None

    def age_s(self, pending: Pending) -> float:
        return self.age

    async def start(self, timeout: float) -> m.EncoderInfo:
        former = [group for group in self._groups.of(self.index) if group is not self]
        assert all(group.stopped for group in former), "a group lives beside the one that takes its place"
        if self._groups.failure and (self._groups.failing is None or self.index in self._groups.failing):
            raise StartupError(self._groups.failure)
        return INFO

    async def forward(
        self, modality: Modality, items: tuple[m.ItemRef, ...], expected_s: float | None = None
    ) -> list[m.Done]:
        return await self._call(m.Forward(1, modality, items), expected_s)

    async def ping(self) -> None:
        await self._call(m.Ping(1), None)

    async def _call(self, command: m.Acknowledged, expected_s: float | None) -> list[m.Done]:
        pending = Pending(command, expected_s, started=0.0)
        self.pending.append(pending)
        return await pending.future

    def end_all(self) -> None:
        """The ranks acknowledge what is in progress."""
        for pending in self.pending:
            self.forwarded += isinstance(pending.command, m.Forward)
            pending.future.set_result([m.Done(0, 1)])
        self.pending.clear()

    def stopped_from_outside(self) -> bool:
        return self.halted

    def fail(self, reason: str, cause: Cause, *, outside: bool = False) -> None:
        if self.lost.done():
            return
        self.cause = cause
        self.lost.set_result(reason)
        for pending in self.pending:
            pending.future.set_exception(GroupLost(reason, suspect=True, outside=outside))
            pending.future.exception()

    async def stop(self, grace_s: float = 5.0) -> None:
        self.fail("stopped", self.cause)
        if self._groups.stays is not None:
            await self._groups.stays.wait()
        self.stopped = True
        if self._groups.unkillable:
            raise Unkillable("process 1 cannot be killed")
        self.gone.set_result(None)


class Groups:
    """Makes the groups, in the place of the class RankGroup. `failure`: why new ones cannot start; `failing`: the
    indexes of those groups, None for all. `stays`: until when the processes of lost groups exist. `unkillable`: they
    exist after every signal."""

    def __init__(self) -> None:
        self.all: list[StandInGroup] = []
        self.failure = ""
        self.failing: set[int] | None = None
        self.stays: asyncio.Event | None = None
        self.unkillable = False

    def __call__(
        self,
        spec: GroupSpec,
        forkserver: Forkserver,
        arena: Arena,
        on_progress: Callable[[int, str], None],
        on_warning: Callable[[int, str], None],
    ) -> Any:
        self.all.append(StandInGroup(self, spec.index))
        return self.all[-1]

    def of(self, index: int) -> list[StandInGroup]:
        """The groups that were started with that index."""
        return [group for group in self.all if group.index == index]

    @property
    def last(self) -> StandInGroup:
        return self.all[-1]
