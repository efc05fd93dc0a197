"""Keeps a group of ranks alive: starts it, watches it, restarts it, and says how it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from encode_server.engine.arena import Arena
from encode_server.engine.group import Cause, GroupLost, GroupSpec, Pending, RankGroup
from encode_server.engine.restarts import Restarts
from encode_server.errors import StartupError
from encode_server.runtime.changes import Changes
from encode_server.runtime.forkserver import Forkserver, ForkserverLost
from encode_server.runtime.losses import Losses
from encode_server.telemetry.metrics import Metrics
from encode_server.wire import ranks as m
from encode_server.wire.modality import Modality

log = logging.getLogger(__name__)

PROFILE_LIMIT_S = 60.0  # the first profile of a rank loads libraries
LEAST_LIMIT_S = 5.0  # no forward is taken for a hang before
OVERDUE = 10.0  # times what a forward should have taken
COLD_FORWARDS = 4  # of a new group, which still compile kernels: only the upper bound holds for them
SLOWER = 3.0  # times what a forward should have taken, for each computed beside it: the least limit of a long forward
WATCH_S = 0.5
PROVE_AGAIN_S = 1.0  # after an encode that failed and left the group alive


class EngineState(StrEnum):
    """Where the engine is in its life."""

    LOADING = "loading"
    PROVING = "proving"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class SupervisorOptions:
    """`restarts` of ranks that did nothing are tried within `window_s` seconds; one more, and the group has failed.
    `stall_s`: the upper bound of what a forward may take whose cost has not been learnt. Times in seconds."""

    stall_s: float
    load_timeout_s: float
    restarts: int
    window_s: float = 600.0
    ping_s: float = 5.0
    ping_limit_s: float = 15.0


class Supervisor:
    """Owner of one rank group. `run` lives as long as the server; everything else asks it.

    `prove`: encodes something on this group and returns what is wrong with the result, or nothing. Where it is given,
    a group that has loaded is ready only after that. `changes`: announces every change of state.
    """

    def __init__(
        self,
        spec: GroupSpec,
        forkserver: Forkserver,
        arena: Arena,
        options: SupervisorOptions,
        metrics: Metrics,
        changes: Changes,
        prove: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        self._spec, self._forkserver, self._arena, self._options = spec, forkserver, arena, options
        self._metrics, self._prove = metrics, prove
        self._group: RankGroup | None = None
        self._restarts = Restarts(options.restarts, options.window_s)
        self._changes = changes
        self._state, self._reason = EngineState.LOADING, "the ranks are loading"
        self.info: m.EncoderInfo | None = None
        self.losses = Losses()  # of the ranks, which are lost together

    @property
    def state(self) -> EngineState:
        """Where the engine is; restarting from the moment on at which its ranks are lost."""
        return EngineState.RESTARTING if self._lost is not None else self._state

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        return self._lost or self._reason

    @property
    def _lost(self) -> str | None:
        """Why the ranks that were ready are lost, before `run` has come to it."""
        in_use = self._state in (EngineState.READY, EngineState.PROVING)
        if in_use and self._group is not None and self._group.lost.done():
            return self._group.lost.result()
        return None

    @property
    def restarts(self) -> int:
        """How often the group was started again."""
        return self._restarts.count

    @property
    def rank_states(self) -> list[str]:
        """Per rank, see `RankGroup.states`."""
        return self._group.states if self._group else []

    @property
    def rank_pids(self) -> list[int | None]:
        """Per rank, None where there is no process."""
        return self._group.pids if self._group else []

    @property
    def rank_memory(self) -> list[m.DeviceMemory | None]:
        """Per rank, see `RankGroup.memory`."""
        return self._group.memory if self._group else []

    def forward_age_s(self) -> float | None:
        """Seconds that the ranks have had for the oldest forward that they execute, without the time in which the
        machine gave a rank no core; None when they execute none."""
        oldest = self._group.oldest() if self._group else None
        if self._group is None or oldest is None or oldest.started is None or not isinstance(oldest.command, m.Forward):
            return None
        return self._group.age_s(oldest)

    def limit_s(self) -> float:
        """How long the oldest command may take before the ranks count as hanging."""
        oldest = self._group.oldest() if self._group else None
        return self._limit_s(oldest) if oldest is not None else self._options.stall_s

    @property
    def ready(self) -> bool:
        """Whether the group takes part in the work."""
        return self.state is EngineState.READY

    @property
    def loaded(self) -> bool:
        """Whether forwards can be sent, if only to prove the group."""
        return self.state in (EngineState.READY, EngineState.PROVING)

    async def forward(
        self, modality: Modality, items: tuple[m.ItemRef, ...], expected_s: float | None = None
    ) -> list[m.Done]:
        """Run one batch, which should take `expected_s`, see `RankGroup.forward`. Raises GroupLost, and only once the
        group's processes are gone: what the batch holds in the arena may then be used by another group, or given back.
        """
        group = self._sound()
        try:
            return await group.forward(modality, items, expected_s)
        except GroupLost:
            await asyncio.shield(group.gone)
            raise

    async def start_profile(self, path: str, forwards: int | None) -> list[m.Done]:
        """Have every rank record, see `wire.ranks.StartProfile`. Raises GroupLost."""
        return await self._sound().start_profile(path, forwards)

    async def stop_profile(self) -> list[m.Done]:
        """Have every rank end its profile and begin to write its trace. Raises GroupLost."""
        return await self._sound().stop_profile()

    def _sound(self) -> RankGroup:
        if self._group is None or not self.loaded:
            raise GroupLost(self.reason)
        return self._group

    async def run(self) -> None:
        """Start the group, and again whenever it is lost, until cancelled. Raises StartupError when the ranks cannot
        load or are lost too often."""
        self._set(EngineState.LOADING, "the ranks are loading")
        try:
            while True:
                reason, worked = await self._live_once()
                if self._group is not None:
                    self.losses.note(self._group.cause, reason)
                delay = None if self.info is None else self._restarts.delay(worked=worked)
                if delay is None:
                    raise StartupError(reason)
                assert self._group is not None
                self._metrics.group_restarts[str(self._spec.index)][self._group.cause].inc()
                log.error("%sranks lost (%s); restarting in %.2f s", self._spec.prefix, reason, delay)
                await asyncio.sleep(delay)
        except StartupError as error:
            self._set(EngineState.FAILED, str(error))
            raise
        finally:
            if self._state is not EngineState.FAILED:
                self._set(EngineState.STOPPED, "the server is stopping")

    async def _live_once(self) -> tuple[str, bool]:
        """One group from its start to its end: why it was lost, and whether it had got work done."""
        group = RankGroup(self._spec, self._forkserver, self._arena, self._log_progress, self._log_warning)
        self._group = group
        started = time.monotonic()
        try:
            self.info = await group.start(self._options.load_timeout_s)
            took = time.monotonic() - started
            log.info("%sranks ready after %.2f s: %s", self._spec.prefix, took, self.info)
            async with self._proving(group):
                reason = await self._watch(group)
        except (StartupError, ForkserverLost) as error:
            reason = str(error)
        except OSError as error:  # no descriptors, no processes, a socket path too long, …
            log.exception("%sthe ranks could not be started", self._spec.prefix)
            reason = f"the ranks could not be started: {type(error).__name__}: {error}"
        except asyncio.CancelledError:
            self._set(EngineState.STOPPED, "the server is stopping")
            await group.stop()
            raise
        # All ranks are gone before anything is replayed: a dying rank must not write into slots that are granted again.
        self._set(EngineState.RESTARTING, reason)
        await group.stop(grace_s=1.0)
        return reason, group.forwarded > 0

    @contextlib.asynccontextmanager
    async def _proving(self, group: RankGroup) -> AsyncIterator[None]:
        """Meanwhile the group becomes ready: immediately, or as soon as it has been proven."""
        if self._prove is None:
            self._set(EngineState.READY, "")
            yield
            return
        self._set(EngineState.PROVING, "the first encode of the ranks is in progress")
        task = asyncio.create_task(self._until_proven(group, self._prove))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _until_proven(self, group: RankGroup, prove: Callable[[], Awaitable[str]]) -> None:
        while flaw := await prove():
            if group.lost.done():
                return
            log.warning("%snot ready yet: %s", self._spec.prefix, flaw)
            self._set(EngineState.PROVING, flaw)
            await asyncio.sleep(PROVE_AGAIN_S)
        if not group.lost.done():
            log.info("%sencodes", self._spec.prefix)
            self._set(EngineState.READY, "")

    async def _watch(self, group: RankGroup) -> str:
        """Return the reason once the group is lost: a death it reports, a stalled command, an unanswered ping."""
        pinged = time.monotonic()
        while not group.lost.done():
            await asyncio.wait((group.lost,), timeout=min(WATCH_S, self._options.stall_s / 4))
            oldest = group.oldest()
            if oldest is not None:
                age, limit = group.age_s(oldest), self._limit_s(oldest)
                if age > limit:
                    what = type(oldest.command).__name__.lower()
                    group.fail(
                        f"the ranks hang: a {what} has not ended after {age:.1f} s, expected within {limit:.1f} s",
                        Cause.HANG,
                        outside=group.stopped_from_outside(),
                    )
            elif time.monotonic() - pinged > self._options.ping_s:
                pinged = time.monotonic()
                task = asyncio.create_task(group.ping())
                task.add_done_callback(lambda t: t.cancelled() or t.exception())
        return group.lost.result()

    def _limit_s(self, pending: Pending) -> float:
        """How long the ranks may take for a command: a forward ten times what it should take, but 5 s at least.

        `stall_s` bounds that. A forward that should take long is given more: two of the largest items that are computed
        concurrently on a slow device are no hang. The time behind another forward on a GPU's stream does not count, see
        `RankGroup.age_s`."""
        stall_s = self._options.stall_s
        if isinstance(pending.command, m.StartProfile | m.StopProfile):
            return max(stall_s, PROFILE_LIMIT_S)
        if isinstance(pending.command, m.Ping):
            return min(stall_s, self._options.ping_limit_s)
        if pending.expected_s is None or self._group is None or self._group.forwarded < COLD_FORWARDS:
            return stall_s
        computing = self.info.computing if self.info else 1
        bound_s = max(stall_s, SLOWER * computing * pending.expected_s)
        return min(bound_s, max(LEAST_LIMIT_S, OVERDUE * pending.expected_s))

    def _set(self, state: EngineState, reason: str) -> None:
        self._state, self._reason = state, reason
        self._changes.announce()

    def _log_progress(self, rank: int, step: str) -> None:
        log.info("%srank %d: %s", self._spec.prefix, rank, step)

    def _log_warning(self, rank: int, message: str) -> None:
        log.warning("%srank %d: %s", self._spec.prefix, rank, message)
