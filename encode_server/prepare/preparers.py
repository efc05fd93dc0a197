"""The front's side of the preparers: a queue, the processes, and what happens to an item whose process dies.

The front hands a preparer no more items than it has threads, so that it knows what each process is working on. When one
dies, its items are prepared again, each alone in a process: an item that then ends that process too is to blame.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import zmq

from encode_server.errors import BadMedia, EncodeError, NotReady, StartupError, TooLarge, by_code, first_of
from encode_server.prepare.jobs import AskedPickle, PreparerProcess, PreparingJob, ProcessLost, Stage
from encode_server.prepare.queue import PreparingQueue
from encode_server.runtime.cores import usable_cores
from encode_server.runtime.forkserver import Forkserver, ForkserverLost
from encode_server.runtime.losses import Losses
from encode_server.runtime.outside import OomKills, killed_from_outside
from encode_server.runtime.peer import Peer
from encode_server.telemetry.metrics import Metrics
from encode_server.wire import preparers as m
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality

log = logging.getLogger(__name__)

ENTRY = "encode_server.prepare.worker:main"
LONG_MEDIA = 8 << 20  # bytes from which an item counts as a long job
MAX_HELD = 512 << 20  # bytes of tensors that wait in the preparers for room in the arena, before no item is begun
OVERTIME = 1.5  # times `decode_s`, until the process is killed: most decoders end themselves after `decode_s`
PLACE_S = 30.0  # longest time for copying tensors into the arena
IDLE_S = 3.0  # a process that works on an item and has neither run nor waited for a core for so long is stopped
START_IDLE_S = 10.0  # the same for a process that starts, and may wait for a slow disk
WATCH_S = 0.5
ITEM_WEIGHT = 0.05  # of one item in the mean of the items' processor time
MAX_BARREN = 5  # processes in a row that ended before they could prepare anything
# Deaths of processes until an item that was alone in the last one is to blame. A SIGKILL is the kernel's for lack of
# memory, or comes from outside: where the kernel counts its own, the others are no sign against an item.
SIGKILL_DEATHS, OTHER_DEATHS = 3, 2

Room = Callable[[m.PreparedItem], Awaitable[int]]
"""Finds room in the arena for an item's tensors, and returns the offset in bytes."""


@dataclass(frozen=True)
class PreparerSpec:
    """How many preparers there are, with how many `threads` each, and what each is started with."""

    processes: int
    threads: int
    decode_s: float
    setup: m.PreparerSetup


class Preparers:
    """Owner of the preparer processes. `run` lives as long as the server; `prepare` may be called from any task."""

    def __init__(self, spec: PreparerSpec, forkserver: Forkserver, arena_fd: int, metrics: Metrics) -> None:
        self._spec, self._forkserver, self._arena_fd, self._metrics = spec, forkserver, arena_fd, metrics
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._numbers = itertools.count(1)
        self._processes: dict[int, PreparerProcess] = {}
        self._queue = PreparingQueue(spec.threads * spec.processes)
        self._pickles: dict[int, AskedPickle] = {}
        self._held_bytes = 0
        self._oom_kills = OomKills()
        self._warned: set[str] = set()
        self._cores = usable_cores()
        self._item_s = 0.0  # processor time of an item, on average
        self._turn = 0
        self._ready = asyncio.Event()
        self._closed: str | None = None
        self.losses = [Losses() for _ in range(spec.processes)]

    @property
    def restarts(self) -> int:
        """Preparers started in place of lost ones."""
        return sum(losses.count for losses in self.losses)

    @property
    def states(self) -> list[str]:
        """Per process: `starting`, `idle` or `preparing`."""
        states = ["starting"] * self._spec.processes
        for index, process in self._processes.items():
            if process.ready:
                states[index] = "preparing" if process.preparing else "idle"
        return states

    @property
    def pids(self) -> list[int | None]:
        """Per process, None while it is being started."""
        return [p.peer.pid if (p := self._processes.get(index)) else None for index in range(self._spec.processes)]

    @property
    def queued(self) -> int:
        """Items that wait for a thread."""
        return len(self._queue)

    @property
    def threads(self) -> int:
        """Items that can be prepared concurrently."""
        return self._spec.threads * self._spec.processes

    @property
    def threads_busy(self) -> int:
        """Items that are being prepared, health probes aside."""
        return sum(len(process.shared) for process in self._processes.values())

    @property
    def backlog_s(self) -> float:
        """Seconds until what waits for a thread has been prepared, by the time that items have taken so far."""
        return len(self._queue) * self._item_s / min(self.threads, self._cores)

    def oldest_s(self) -> float | None:
        """How long the longest preparation in progress has taken, health probes aside; None when there is none."""
        began = [job.began for process in self._processes.values() for job in process.shared]
        return time.monotonic() - min(began) if began else None

    async def wait_ready(self) -> None:
        """Return once one preparer can work."""
        await self._ready.wait()

    async def run(self) -> None:
        """Keep the processes alive until cancelled. Raises StartupError when they cannot work at all."""
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(self._spec.processes):
                    group.create_task(self._keep_alive(index))
                group.create_task(self._watch())
        except* StartupError as errors:
            raise StartupError(str(first_of(errors))) from None
        finally:
            self._closed = "the server is stopping"
            await self._close(NotReady(self._closed))

    async def _close(self, error: NotReady) -> None:
        """End the processes, then everything that was asked of them: by then no process writes into the arena."""
        processes = list(self._processes.values())
        self._processes.clear()
        self._ready.clear()
        await asyncio.gather(*(process.peer.close() for process in processes))
        jobs = [job for process in processes for job in process.jobs.values()]
        for job in (*jobs, *self._queue.drain()):
            job.process = None
            job.fail(error)
        for asked in self._pickles.values():
            asked.fail(error)
        self._ready.set()  # who waits for a process sees that none will come
        self._context.destroy(linger=0)

    async def prepare(
        self,
        modality: Modality,
        media: bytes,
        options: ItemOptions,
        *,
        max_cost: int,
        room: Room,
        express: bool = False,
    ) -> m.PreparedItem:
        """Have one item decoded, preprocessed, and its tensors copied to where `room` says.

        `max_cost`: of a piece, see `Preprocessor.split`. `room` is asked once the size is known, and again, for as
        much, when a process was lost meanwhile. When this method returns or raises, no preparer touches that room any
        more. `express`: on the thread that each process keeps for health probes.

        Raises EncodeError. A cancellation ends what has not begun.
        """
        number = next(self._numbers)
        long = modality is Modality.VIDEO or len(media) > LONG_MEDIA
        job = PreparingJob(number, m.Prepare(number, modality, options, max_cost, express), media, long)
        try:
            while True:
                try:
                    item = await self._until_held(job)
                    offset = await room(item)
                    await self._place(job, item, offset)
                    return item
                except ProcessLost:
                    self._metrics.prepared_again.inc()
        finally:
            self._forget(job)

    async def pickle(self, dtype: str, grid: list[list[int]] | None, seconds: list[float] | None) -> m.Pickled:
        """The pickle programs of torch objects, see `wire.preparers.Pickle`."""
        number = next(self._numbers)
        command = m.Pickle(number, dtype, grid, seconds)
        try:
            while True:
                await self._until_workers()
                asked = self._pickles[number] = AskedPickle(min(self._workers(), key=lambda process: len(process.jobs)))
                asked.process.peer.link.send(m.encode(command))
                try:
                    return await asked.answer
                except ProcessLost:
                    continue
        finally:
            self._pickles.pop(number, None)

    async def _until_workers(self) -> None:
        """Return once a process can work. Raises NotReady when none will again."""
        while not self._workers():
            if self._closed is not None:
                raise NotReady(self._closed)
            await self._ready.wait()

    async def _until_held(self, job: PreparingJob) -> m.PreparedItem:
        if self._closed is not None:
            raise NotReady(self._closed)
        step = job.next_step()
        job.stage, job.process = Stage.QUEUED, None
        if job.command.express:
            await self._until_workers()
            self._begin(job, self._for_express())
        else:
            self._queue.put(job)
            self._dispatch()
        item = await step
        assert item is not None
        return item

    async def _place(self, job: PreparingJob, item: m.PreparedItem, offset: int) -> None:
        process = job.process
        if process is None:  # lost while the item waited for room
            raise ProcessLost
        step = job.next_step()
        job.stage, job.began = Stage.PLACING, time.monotonic()
        self._hold(job, 0)
        process.peer.link.send(m.encode(m.Place(job.number, offset)))
        try:
            await asyncio.shield(step)
        except asyncio.CancelledError:
            while not step.done():  # the preparer writes into room that is given back after this
                try:
                    await asyncio.wait((step,))
                except asyncio.CancelledError:
                    continue
            raise

    def _forget(self, job: PreparingJob) -> None:
        """The caller has its result, or has gone."""
        self._queue.remove(job)
        process = job.process
        if process is None or job.number not in process.jobs:
            return
        job.forgotten = True
        process.peer.link.send(m.encode(m.Drop(job.number)))
        if job.stage is Stage.HELD:
            self._end(job)
        # A preparation cannot be interrupted: it keeps its thread until the preparer says that it has ended.

    def _end(self, job: PreparingJob) -> None:
        """The job leaves its process."""
        self._hold(job, 0)
        if job.process is not None:
            job.process.jobs.pop(job.number, None)
            job.process = None
        self._dispatch()

    def _hold(self, job: PreparingJob, nbytes: int) -> None:
        """Count the bytes of the job's tensors that wait for room."""
        self._held_bytes += nbytes - job.held
        job.held = nbytes

    def _workers(self) -> list[PreparerProcess]:
        return [process for process in self._processes.values() if process.ready]

    def _for_express(self) -> PreparerProcess:
        """The least busy process, each in turn where several are."""
        self._turn += 1
        return min(
            self._workers(),
            key=lambda process: (len(process.preparing), (process.index - self._turn) % self._spec.processes),
        )

    def _dispatch(self) -> None:
        """Hand out items while there are threads for them."""
        emptied = self._dispatch_isolated()
        while self._held_bytes < MAX_HELD:
            free = [
                process
                for process in self._workers()
                if process is not emptied and not process.exclusive and len(process.shared) < self._spec.threads
            ]
            long = sum(job.long for process in self._processes.values() for job in process.preparing)
            if not free or (job := self._queue.take(long)) is None:
                return
            self._begin(job, min(free, key=lambda process: len(process.preparing)))

    def _dispatch_isolated(self) -> PreparerProcess | None:
        """Begin what has to be alone where a process is empty; else the process that is to become empty."""
        while self._queue.isolated:
            workers = self._workers()
            if not workers:
                return None
            process = min(workers, key=lambda process: len(process.shared))
            if process.shared:
                return process
            self._begin(self._queue.isolated.popleft(), process)
        return None

    def _begin(self, job: PreparingJob, process: PreparerProcess) -> None:
        job.process, job.stage, job.began = process, Stage.PREPARING, time.monotonic()
        if not process.jobs:
            process.oom_kills = self._oom_kills.count()
        process.jobs[job.number] = job
        process.peer.link.send(m.encode(job.command), job.media)

    async def _keep_alive(self, index: int) -> None:
        barren = 0
        while True:
            process = await self._start(index)
            try:
                code = await process.peer.exited
            finally:
                await process.peer.close()
            blamed = bool(process.shared)
            self._on_exit(process, code)
            if process.prepared_any:
                barren = 0
            elif not blamed:  # or a few items that crash their decoders would end the server
                barren += 1
            if process.failure and barren:
                raise StartupError(process.failure)
            if barren > MAX_BARREN:
                raise StartupError(f"preparers end before they prepare anything: {_how(code)}")
            reason = process.failure or _how(code)
            self.losses[index].note(process.cause, reason)
            self._metrics.preparer_restarts[process.cause].inc()
            log.error("preparer %d was lost (%s); starting another", index, reason)
            if barren:
                await asyncio.sleep(0.1 * 2**barren)

    async def _start(self, index: int) -> PreparerProcess:
        while True:
            process = self._new_process(index)
            setup = msgspec.structs.replace(self._spec.setup, socket=process.peer.link.path, index=index)
            argument = msgspec.msgpack.encode(setup)
            try:
                await process.peer.start(self._forkserver, f"preparer {index}", ENTRY, argument, (self._arena_fd,))
            except ForkserverLost as lost:
                await process.peer.close()
                log.warning("preparer %d could not be started: %s", index, lost)
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                await process.peer.close()
                raise
            else:
                return process

    def _new_process(self, index: int) -> PreparerProcess:
        def on_message(frames: list[bytes]) -> None:
            self._on_event(process, m.decode_event(frames[0]))

        process = self._processes[index] = PreparerProcess(index, Peer(self._context, on_message))
        return process

    def _on_event(self, process: PreparerProcess, event: m.Event) -> None:
        match event:
            case m.Ready():
                process.ready = True
                self._ready.set()
                self._dispatch()
            case m.Warned(message):
                if message not in self._warned:  # every process says it, and each that takes the place of another
                    self._warned.add(message)
                    log.warning("%s", message)
            case m.Failed(message):
                process.failure = message
            case m.Pickled(number):
                if (asked := self._pickles.get(number)) is not None and not asked.answer.done():
                    asked.answer.set_result(event)
            case m.Waiting(number):
                process.jobs[number].began = math.inf
            case m.Began(number):
                process.jobs[number].began = time.monotonic()
            case m.Prepared(number, item, decode_s, preprocess_s):
                process.prepared_any = True
                self._metrics.spend("decode", decode_s)
                self._metrics.spend("preprocess", preprocess_s)
                self._item_s += (decode_s + preprocess_s - self._item_s) * (ITEM_WEIGHT if self._item_s else 1.0)
                job = process.jobs[number]
                if job.forgotten:  # prepared before the preparer read that nobody wants the item
                    self._end(job)
                    return
                job.stage = Stage.HELD
                self._hold(job, item.nbytes)
                if not job.step.done():
                    job.step.set_result(item)
                self._dispatch()
            case m.Placed(number, copy_s):
                self._metrics.spend("copy", copy_s)
                job = process.jobs[number]
                if not job.step.done():
                    job.step.set_result(None)
                self._end(job)
            case m.Refused():
                process.prepared_any = True
                self._on_refused(process.jobs[event.job], event)

    def _on_refused(self, job: PreparingJob, refused: m.Refused) -> None:
        beside_others = job.process is not None and len(job.process.preparing) > 1
        self._end(job)
        if refused.out_of_memory and beside_others and not job.alone:
            job.alone = True  # another item may have had the memory
            job.fail(ProcessLost())
        elif refused.code == EncodeError.code:
            job.log(logging.ERROR, "preparing an item failed: %s", refused.message)
            job.fail(EncodeError("an internal error, see the server's log"))
        else:
            job.fail(by_code(refused.code, refused.message))

    def _on_exit(self, process: PreparerProcess, code: int) -> None:
        """The process is gone: begin its items again, and blame the item that was alone in it."""
        if self._processes.get(process.index) is process:
            del self._processes[process.index]
        if not self._workers():
            self._ready.clear()
        suspects = process.shared
        jobs, process.jobs = list(process.jobs.values()), {}
        for job in jobs:
            self._hold(job, 0)
            job.process = None
            job.fail(self._verdict(job, suspects, process, code) or ProcessLost())
        for asked in self._pickles.values():
            if asked.process is process:
                asked.fail(ProcessLost())
        self._dispatch()

    def _verdict(
        self, job: PreparingJob, suspects: list[PreparingJob], process: PreparerProcess, code: int
    ) -> EncodeError | None:
        """What to tell the caller of a job whose process is gone; None when the job begins again."""
        if job.overtime:
            return TooLarge(f"decoding the media takes longer than {self._spec.decode_s:g} s")
        if job not in suspects or process.stalled or any(suspect.overtime for suspect in suspects):
            return None
        outside = killed_from_outside(code, process.oom_kills, self._oom_kills.count())
        if outside and process.oom_kills is not None and not process.hung:
            return None
        job.deaths += 1
        needed = SIGKILL_DEATHS if code == -signal.SIGKILL else OTHER_DEATHS
        if job.alone and job.deaths >= needed:
            job.log(logging.WARNING, "an item ended %d preparers (%s): refusing it", job.deaths, _how(code))
            return BadMedia("its decoder hangs" if process.hung else "its decoder crashed")
        job.alone = True
        return None

    async def _watch(self) -> None:
        """End processes that decode for too long or stand still."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            for process in list(self._processes.values()):
                self._judge(process, now)

    def _judge(self, process: PreparerProcess, now: float) -> None:
        if process.overtime or process.stalled:
            return  # killed already, and soon gone
        limits = {Stage.PREPARING: OVERTIME * self._spec.decode_s, Stage.PLACING: PLACE_S}
        for job in process.jobs.values():
            age = now - job.began
            if age <= limits.get(job.stage, math.inf):
                continue
            if job.stage is Stage.PREPARING:
                job.overtime = process.overtime = True
            else:
                process.stalled = True
            job.log(logging.ERROR, "preparer %d has been %s one item for %.0f s", process.index, job.stage, age)
            process.peer.kill()
        if process.still_s(now) > (IDLE_S if process.ready else START_IDLE_S):
            process.hung = True
            log.error("preparer %d stands still", process.index)
            process.peer.kill()


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"code {code}"
