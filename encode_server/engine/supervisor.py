"""Keeps a group of ranks alive: starts it, watches it, restarts it, and says how it is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum

from encode_server.engine.arena import Arena
from encode_server.engine.group import GroupLost, GroupSpec, RankGroup
from encode_server.engine.restarts import Restarts
from encode_server.errors import StartupError
from encode_server.wire import ranks as m
from encode_server.wire.modality import Modality

log = logging.getLogger(__name__)

PROFILE_LIMIT_S = 300.0  # a trace of many forwards takes long to write


class EngineState(StrEnum):
    """Where the engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class SupervisorOptions:
    """`restarts` within `window_s` seconds are tried; one more ends the server. Times in seconds."""

    stall_s: float
    load_timeout_s: float
    restarts: int
    window_s: float = 600.0
    ping_s: float = 5.0
    ping_limit_s: float = 15.0


class Supervisor:
    """Owner of the rank group. `run` lives as long as the server; everything else asks it."""

    def __init__(
        self,
        spec: GroupSpec,
        arena: Arena,
        options: SupervisorOptions,
        on_fatal: Callable[[str], None],
    ) -> None:
        self._spec, self._arena, self._options, self._on_fatal = spec, arena, options, on_fatal
        self._group: RankGroup | None = None
        self._restarts = Restarts(options.restarts, options.window_s)
        self._changed = asyncio.Event()
        self._state, self._reason = EngineState.LOADING, "the ranks are loading"
        self.info: m.EncoderInfo | None = None

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

    def oldest(self) -> tuple[m.Acknowledged, float] | None:
        """The command being executed and its age in seconds, see `RankGroup.oldest`."""
        return self._group.oldest() if self._group else None

    @property
    def ready(self) -> bool:
        """Whether forwards can be sent."""
        return self.state is EngineState.READY

    async def wait_ready(self) -> m.EncoderInfo:
        """Return once forwards can be sent. Raises GroupLost when they never will be again."""
        while not self.ready:
            if self.state in (EngineState.FAILED, EngineState.STOPPED):
                raise GroupLost(self.reason)
            await self._changed.wait()
        assert self.info is not None
        return self.info

    async def forward(self, modality: Modality, items: tuple[m.ItemRef, ...]) -> list[m.Done]:
        """Run one batch, see `RankGroup.forward`."""
        if self._group is None or not self.ready:
            raise GroupLost(self.reason)
        return await self._group.forward(modality, items)

    async def start_profile(self, path: str, forwards: int | None) -> list[m.Done]:
        """Have every rank record, see `messages.StartProfile`. Raises GroupLost."""
        if self._group is None or not self.ready:
            raise GroupLost(self.reason)
        return await self._group.start_profile(path, forwards)

    async def stop_profile(self) -> list[m.Done]:
        """Have every rank write its trace. Raises GroupLost."""
        if self._group is None or not self.ready:
            raise GroupLost(self.reason)
        return await self._group.stop_profile()

    async def run(self) -> None:
        """Start the group, and again whenever it is lost, until cancelled or until it fails too often."""
        while True:
            group = RankGroup(self._spec, self._arena, self._log_progress)
            self._group = group
            started = time.monotonic()
            ready = float("inf")
            try:
                self.info = await group.start(self._options.load_timeout_s)
                ready = time.monotonic()
                log.info("ranks ready after %.1f s: %s", ready - started, self.info)
                self._set(EngineState.READY, "")
                reason = await self._watch(group)
            except StartupError as error:
                reason = str(error)
            except asyncio.CancelledError:
                self._set(EngineState.STOPPED, "the server is stopping")
                await group.stop()
                raise
            except Exception as error:  # no descriptors, no processes, a socket path too long, …
                log.exception("the ranks could not be started")
                reason = f"the ranks could not be started: {type(error).__name__}: {error}"
            lost = time.monotonic()
            # Reaped before anything is replayed: a dying rank must not write into slots that are granted again.
            self._set(EngineState.RESTARTING, reason)
            await _to_its_end(group.stop(grace=1.0))
            delay = None if self.info is None else self._restarts.delay(max(0.0, lost - ready))
            if delay is None:
                self._set(EngineState.FAILED, reason)
                self._on_fatal(reason)
                return
            log.error("ranks lost (%s); restarting in %.2f s", reason, delay)
            await asyncio.sleep(delay)

    async def _watch(self, group: RankGroup) -> str:
        """Return the reason once the group is lost: a death it reports, a stalled command, an unanswered ping."""
        pinged = time.monotonic()
        while not group.lost.done():
            await asyncio.wait((group.lost,), timeout=min(0.25, self._options.stall_s / 4))
            oldest = group.oldest()
            if oldest is not None:
                what, limit = ("a forward", self._options.stall_s)
                if isinstance(oldest[0], m.StartProfile | m.StopProfile):
                    what, limit = ("a profile", max(self._options.stall_s, PROFILE_LIMIT_S))
                elif isinstance(oldest[0], m.Ping):
                    what, limit = ("a ping", min(self._options.stall_s, self._options.ping_limit_s))
                if oldest[1] > limit:
                    group.fail(f"the ranks hang: {what} has not ended after {oldest[1]:.1f} s")
            elif time.monotonic() - pinged > self._options.ping_s:
                pinged = time.monotonic()
                task = asyncio.create_task(group.ping())
                task.add_done_callback(lambda t: t.cancelled() or t.exception())
        return group.lost.result()

    def _set(self, state: EngineState, reason: str) -> None:
        self._state, self._reason = state, reason
        self._changed.set()
        self._changed = asyncio.Event()

    def _log_progress(self, rank: int, step: str) -> None:
        log.info("rank %d: %s", rank, step)


async def _to_its_end(work: Coroutine[None, None, None]) -> None:
    """Await `work` also when cancelled meanwhile: half of a stop leaves processes, and sockets that nobody closes."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
