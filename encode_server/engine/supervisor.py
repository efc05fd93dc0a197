"""Keeps a group of ranks alive: starts it, watches it, restarts it, and says how it is."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from enum import StrEnum

from encode_server.engine.arena import Arena
from encode_server.engine.group import Cause, GroupLost, GroupSpec, Pending, RankGroup
from encode_server.engine.restarts import Restarts
from encode_server.errors import NotReady, StartupError
from encode_server.runtime.changes import Changes
from encode_server.runtime.forkserver import Forkserver, ForkserverLost
from encode_server.runtime.losses import Losses
from encode_server.telemetry.metrics import Metrics
from encode_server.wire import ranks as m
from encode_server.wire.modality import Modality

log = logging.getLogger(__name__)

PROFILE_LIMIT_S = 300.0  # a trace of many forwards takes long to write
LEAST_LIMIT_S = 5.0  # no forward is taken for a hang before
OVERDUE = 10.0  # times what a forward should have taken
COLD_FORWARDS = 4  # of a new group, which still compile kernels: only the upper bound holds for them
WATCH_S = 0.5


class EngineState(StrEnum):
    """Where the engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class SupervisorOptions:
    """`restarts` of ranks that did nothing are tried within `window_s` seconds; one more ends the server. `stall_s`:
    the upper bound of what a forward may take. Times in seconds."""

    stall_s: float
    load_timeout_s: float
    restarts: int
    window_s: float = 600.0
    ping_s: float = 5.0
    ping_limit_s: float = 15.0


class Supervisor:
    """Owner of the rank group. `run` lives as long as the server; everything else asks it."""

    def __init__(
        self, spec: GroupSpec, forkserver: Forkserver, arena: Arena, options: SupervisorOptions, metrics: Metrics
    ) -> None:
        self._spec, self._forkserver, self._arena, self._options = spec, forkserver, arena, options
        self._metrics = metrics
        self._group: RankGroup | None = None
        self._restarts = Restarts(options.restarts, options.window_s)
        self._changes = Changes()
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
        if self._state is EngineState.READY and self._group is not None and self._group.lost.done():
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

    def forward_age_s(self) -> float | None:
        """Seconds since the ranks came to the oldest forward that they execute; None when they execute none."""
        oldest = self._group.oldest() if self._group else None
        if oldest is None or oldest.started is None or not isinstance(oldest.command, m.Forward):
            return None
        return time.monotonic() - oldest.started

    def limit_s(self) -> float:
        """How long the oldest command may take before the ranks count as hanging."""
        oldest = self._group.oldest() if self._group else None
        return self._limit_s(oldest) if oldest is not None else self._options.stall_s

    @property
    def ready(self) -> bool:
        """Whether forwards can be sent."""
        return self.state is EngineState.READY

    async def wait_ready(self) -> m.EncoderInfo:
        """Return once forwards can be sent. Raises GroupLost when they never will be again."""
        while not self.ready:
            if self.state in (EngineState.FAILED, EngineState.STOPPED):
                raise GroupLost(self.reason)
            await self._changes.wait()
        assert self.info is not None
        return self.info

    async def changed(self) -> None:
        """Return at the next change of state."""
        await self._changes.wait()

    async def until_ready(self) -> m.EncoderInfo:
        """`wait_ready` for a request: raises NotReady when forwards can never be sent again."""
        try:
            return await self.wait_ready()
        except GroupLost as lost:
            raise NotReady(f"the encoder is not available: {lost}") from None

    async def forward(
        self, modality: Modality, items: tuple[m.ItemRef, ...], expected_s: float | None = None
    ) -> list[m.Done]:
        """Run one batch, which should take `expected_s`, see `RankGroup.forward`."""
        return await self._sound().forward(modality, items, expected_s)

    async def start_profile(self, path: str, forwards: int | None) -> list[m.Done]:
        """Have every rank record, see `wire.ranks.StartProfile`. Raises NotReady."""
        try:
            return await self._sound().start_profile(path, forwards)
        except GroupLost as lost:
            raise NotReady(f"the encoder is not available: {lost}") from None

    async def stop_profile(self) -> list[m.Done]:
        """Have every rank write its trace. Raises NotReady."""
        try:
            return await self._sound().stop_profile()
        except GroupLost as lost:
            raise NotReady(f"the encoder is not available: {lost}") from None

    def _sound(self) -> RankGroup:
        if self._group is None or not self.ready:
            raise GroupLost(self.reason)
        return self._group

    async def run(self) -> None:
        """Start the group, and again whenever it is lost, until cancelled. Raises StartupError when the ranks cannot
        load or are lost too often."""
        try:
            while True:
                reason, worked = await self._live_once()
                if self._group is not None:
                    self.losses.note(self._group.cause, reason)
                delay = None if self.info is None else self._restarts.delay(worked=worked)
                if delay is None:
                    raise StartupError(reason)
                assert self._group is not None
                self._metrics.group_restarts[self._group.cause].inc()
                log.error("ranks lost (%s); restarting in %.2f s", reason, delay)
                await asyncio.sleep(delay)
        except StartupError as error:
            self._set(EngineState.FAILED, str(error))
            raise
        finally:
            if self._state is not EngineState.FAILED:
                self._set(EngineState.STOPPED, "the server is stopping")

    async def _live_once(self) -> tuple[str, bool]:
        """One group from its start to its end: why it was lost, and whether it had got work done."""
        group = RankGroup(self._spec, self._forkserver, self._arena, self._log_progress)
        self._group = group
        started = time.monotonic()
        try:
            self.info = await group.start(self._options.load_timeout_s)
            log.info("ranks ready after %.2f s: %s", time.monotonic() - started, self.info)
            self._set(EngineState.READY, "")
            reason = await self._watch(group)
        except (StartupError, ForkserverLost) as error:
            reason = str(error)
        except OSError as error:  # no descriptors, no processes, a socket path too long, …
            log.exception("the ranks could not be started")
            reason = f"the ranks could not be started: {type(error).__name__}: {error}"
        except asyncio.CancelledError:
            self._set(EngineState.STOPPED, "the server is stopping")
            await group.stop()
            raise
        # All ranks are gone before anything is replayed: a dying rank must not write into slots that are granted again.
        self._set(EngineState.RESTARTING, reason)
        await group.stop(grace_s=1.0)
        return reason, group.forwarded > 0

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
                    )
            elif time.monotonic() - pinged > self._options.ping_s:
                pinged = time.monotonic()
                task = asyncio.create_task(group.ping())
                task.add_done_callback(lambda t: t.cancelled() or t.exception())
        return group.lost.result()

    def _limit_s(self, pending: Pending) -> float:
        """How long the ranks may take for a command: a forward ten times what it should take, but 5 s at least."""
        stall_s = self._options.stall_s
        if isinstance(pending.command, m.StartProfile | m.StopProfile):
            return max(stall_s, PROFILE_LIMIT_S)
        if isinstance(pending.command, m.Ping):
            return min(stall_s, self._options.ping_limit_s)
        if pending.expected_s is None or self._group is None or self._group.forwarded < COLD_FORWARDS:
            return stall_s
        return min(stall_s, max(LEAST_LIMIT_S, OVERDUE * pending.expected_s))

    def _set(self, state: EngineState, reason: str) -> None:
        self._state, self._reason = state, reason
        self._changes.announce()

    def _log_progress(self, rank: int, step: str) -> None:
        log.info("rank %d: %s", rank, step)
