"""The rank groups of one server, side by side: each is a whole encoder, and they share the work."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Container
from functools import partial
from typing import NamedTuple

from encode_server.engine.arena import Arena
from encode_server.engine.group import GroupLost, GroupSpec
from encode_server.engine.supervisor import EngineState, Supervisor, SupervisorOptions
from encode_server.errors import NotReady, StartupError
from encode_server.runtime.changes import Changes
from encode_server.runtime.forkserver import Forkserver
from encode_server.runtime.peer import Unkillable
from encode_server.telemetry.metrics import Metrics
from encode_server.wire import ranks as m

log = logging.getLogger(__name__)

AGAIN_S = 60.0  # from the failure of a group to its next start, unless all have failed
OVER = (EngineState.FAILED, EngineState.STOPPED)


class Told(NamedTuple):
    """A rank's answer to a command about profiles. `group`: what its trace's name has between path and rank. `pid`: of
    the rank's process."""

    group: str
    pid: int | None
    done: m.Done


class RankGroups:
    """Owner of every group's supervisor. The whole is ready while at least one group is.

    A group that fails for good is started again every minute as long as another is of use. With one group alone its
    failure is the server's. `prove`: encodes something on the group of that index, see `Supervisor`; where there is one
    group, the server's own first encode does that.
    """

    def __init__(
        self,
        spec: GroupSpec,
        forkserver: Forkserver,
        arena: Arena,
        options: SupervisorOptions,
        metrics: Metrics,
        prove: Callable[[int], Awaitable[str]],
    ) -> None:
        """`spec`: of every group; `spec.groups` says how many there are."""
        several = spec.groups > 1
        self._changes = Changes()
        self.groups = [
            Supervisor(
                dataclasses.replace(spec, index=index),
                forkserver,
                arena,
                options,
                metrics,
                self._changes,
                partial(prove, index) if several else None,
            )
            for index in range(spec.groups)
        ]

    @property
    def ready(self) -> bool:
        """Whether a group takes part in the work."""
        return any(group.ready for group in self.groups)

    @property
    def state(self) -> EngineState:
        """The state of the group that is nearest to being ready."""
        return self._best.state

    @property
    def reason(self) -> str:
        """Why no group is ready; empty when one is."""
        return self._best.reason

    @property
    def over(self) -> str | None:
        """Why no group ever will be ready again; None while one may."""
        return self.reason if all(group.state in OVER for group in self.groups) else None

    @property
    def restarts(self) -> int:
        """How often a group was started again."""
        return sum(group.restarts for group in self.groups)

    @property
    def info(self) -> m.EncoderInfo | None:
        """What each group loads; None before one has."""
        return next((group.info for group in self.groups if group.info is not None), None)

    @property
    def slowest(self) -> Supervisor:
        """The group whose oldest forward has used most of its time."""
        return max(self.groups, key=lambda group: (group.forward_age_s() or 0.0) / group.limit_s())

    async def wait_ready(self) -> m.EncoderInfo:
        """Return once a group is ready. Raises GroupLost when none ever will be again."""
        while not self.ready:
            if self.over is not None:
                raise GroupLost(self.over)
            await self.changed()
        assert self.info is not None
        return self.info

    async def until_ready(self, group: int | None = None) -> m.EncoderInfo:
        """`wait_ready` for a request: raises NotReady when no group ever will be ready. For `group`, if that is given,
        which need only be loaded: NotReady when that is not so."""
        if group is not None:
            one = self.groups[group]
            if not one.loaded or one.info is None:
                raise NotReady(f"group {group} is not available: {one.reason}")
            return one.info
        try:
            return await self.wait_ready()
        except GroupLost as lost:
            raise NotReady(f"the encoder is not available: {lost}") from None

    async def changed(self) -> None:
        """Return at the next change of a group's state."""
        await self._changes.wait()

    async def start_profile(self, path: str, forwards: int | None) -> list[Told]:
        """Have every rank of every ready group record, see `wire.ranks.StartProfile`; the traces of several groups also
        have the group in their names. Raises NotReady without a ready group."""
        return await self._tell(lambda name, group: group.start_profile(path + name, forwards))

    async def stop_profile(self, only: Container[str] | None = None) -> list[Told]:
        """Have every rank write its trace, or the ranks of the groups `only`, by `Told.group`. Raises NotReady without
        a ready group."""
        return await self._tell(lambda name, group: group.stop_profile(), only)

    async def run(self) -> None:
        """Keep every group alive until cancelled. Raises StartupError when all have failed, or when a process cannot be
        killed."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in self.groups:
                    tasks.create_task(self._keep(group))
        except* StartupError as errors:
            raise StartupError(str(errors.exceptions[0])) from None

    async def _keep(self, group: Supervisor) -> None:
        while True:
            try:
                await group.run()
            except Unkillable:
                raise
            except StartupError as error:
                if all(each.state is EngineState.FAILED for each in self.groups):
                    raise
                index = self.groups.index(group)
                log.error("group %d is out of use, and is tried again in %g s: %s", index, AGAIN_S, error)
                await asyncio.sleep(AGAIN_S)

    async def _tell(
        self,
        call: Callable[[str, Supervisor], Awaitable[list[m.Done]]],
        only: Container[str] | None = None,
    ) -> list[Told]:
        """What the ranks of the ready groups answer. A group that is lost meanwhile has no say, unless all are."""
        several = len(self.groups) > 1
        named = {f"group{index}-" if several else "": group for index, group in enumerate(self.groups)}
        ready = {name: group for name, group in named.items() if group.ready and (only is None or name in only)}
        answers = await asyncio.gather(*(call(name, group) for name, group in ready.items()), return_exceptions=True)
        told = []
        for (name, group), answer in zip(ready.items(), answers, strict=True):
            if isinstance(answer, list):
                pids = dict(enumerate(group.rank_pids))
                told += [Told(name, pids.get(done.rank), done) for done in answer]
            elif not isinstance(answer, GroupLost):
                raise answer
        if not told:
            lost = next((str(answer) for answer in answers if isinstance(answer, GroupLost)), self.reason)
            raise NotReady(f"the encoder is not available: {lost}")
        return told

    @property
    def _best(self) -> Supervisor:
        return min(self.groups, key=lambda group: NEARNESS.index(group.state))


NEARNESS = [
    EngineState.READY,
    EngineState.PROVING,
    EngineState.RESTARTING,
    EngineState.LOADING,
    EngineState.FAILED,
    EngineState.STOPPED,
]
