"""An item on its way through the preparers, and a preparer process with the items it works on: the front's books."""

from __future__ import annotations

import asyncio
import logging
import time
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import StrEnum

from encode_server.runtime.peer import Peer
from encode_server.runtime.progress import active_seconds
from encode_server.wire import preparers as m

log = logging.getLogger(__name__)
LOOK_S = 1.0  # an item that ends sooner is not looked at closely: /proc is not read for it


class Stage(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    PREPARING = "preparing"
    HELD = "held"
    PLACING = "placing"


class ProcessLost(Exception):
    """The job's process is gone; the job can begin again."""


@dataclass(eq=False)
class PreparingJob:
    """One item from its queueing until its tensors are in the arena. `step` ends when the present stage does: with the
    item when its tensors exist, with None when they are in the arena."""

    number: int
    command: m.Prepare
    media: bytes
    long: bool
    stage: Stage = Stage.QUEUED
    alone: bool = False  # to be prepared in a process that does nothing else
    deaths: int = 0
    began: float = 0.0  # of `time.monotonic()`, the present stage in the process
    overtime: bool = False
    context: Context = field(default_factory=copy_context)  # of the request, for what is logged about the item
    held: int = 0  # bytes of its tensors that wait in the process for room
    process: PreparerProcess | None = None
    forgotten: bool = False  # the caller has gone
    step: asyncio.Future[m.PreparedItem | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def fail(self, error: Exception) -> None:
        """End the present stage with an error."""
        if not self.step.done():
            self.step.set_exception(error)
            self.step.exception()  # the caller may be gone

    def log(self, level: int, message: str, *args: object) -> None:
        """Log a line about the item that names its request."""
        self.context.run(log.log, level, message, *args)

    def next_step(self) -> asyncio.Future[m.PreparedItem | None]:
        """Begin a stage."""
        self.step = asyncio.get_running_loop().create_future()
        return self.step


@dataclass(eq=False)
class PreparerProcess:
    """A process and the items that it works on or holds. `overtime`: the front killed the process because the decode of
    an item took too long. `stalled`: the front killed the process because a copy into the arena did not end; no item is
    to blame for that. `hung`: the front killed the process because the process stood still. `oom_kills`: what
    `OomKills.count` gave when the process began the first of its items."""

    index: int
    peer: Peer
    jobs: dict[int, PreparingJob] = field(default_factory=dict)
    ready: bool = False
    prepared_any: bool = False
    failure: str = ""
    stalled: bool = False
    hung: bool = False
    overtime: bool = False
    oom_kills: int | None = None
    began: float = field(default_factory=time.monotonic)
    active_s: float = 0.0
    active_at: float = 0.0

    @property
    def cause(self) -> str:
        """Why the process ended, in one word, for counting: see `telemetry.metrics.PREPARER_CAUSES`."""
        if self.overtime:
            return "overtime"
        return "hang" if self.stalled or self.hung else "failed" if self.failure else "died"

    @property
    def preparing(self) -> list[PreparingJob]:
        """What is being decoded or preprocessed."""
        return [job for job in self.jobs.values() if job.stage is Stage.PREPARING]

    @property
    def shared(self) -> list[PreparingJob]:
        """What is being prepared on the threads of the pool: health probes have a thread of their own."""
        return [job for job in self.preparing if not job.command.express]

    @property
    def exclusive(self) -> bool:
        """Whether the process works on an item that must be alone."""
        return any(job.alone for job in self.preparing)

    def still_s(self, now: float) -> float:
        """For how many seconds the process has neither run nor waited for a core although it is busy or starts. 0 where
        the kernel does not say."""
        began = [job.began for job in self.jobs.values() if job.stage in (Stage.PREPARING, Stage.PLACING)]
        if not self.ready:
            began.append(self.began)
        if self.peer.pid is None or not began or now - min(began) < LOOK_S:
            self.active_at = now
            return 0.0
        active = active_seconds(self.peer.pid)
        if active != self.active_s or not active:
            self.active_s, self.active_at = active, now
        return now - self.active_at


@dataclass(eq=False)
class AskedPickle:
    """A `Pickle` that was sent to a process."""

    process: PreparerProcess
    answer: asyncio.Future[m.Pickled] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # the caller may be gone
