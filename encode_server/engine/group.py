"""A group of rank processes that execute one stream of commands, and the front's view of how far they are."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from encode_server.engine.arena import Arena
from encode_server.engine.launch import spawn_rank
from encode_server.errors import StartupError
from encode_server.runtime.rundir import RunDirectory
from encode_server.wire import ranks as m
from encode_server.wire.modality import Modality

PEERS_S = 2.0  # after a rank's failure those that fail too have said so; one that has not waits in a collective
LAST_WORDS_S = 0.2  # what a rank that has ended says of why may still be on its way


class GroupLost(Exception):
    """The ranks died, hang or stopped making sense. What was in flight has not been delivered.

    `suspect`: this was a command being executed, so it may be the cause. `out_of_memory`: it is, for lack of memory.
    """

    def __init__(self, reason: str, *, suspect: bool = False, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.suspect, self.out_of_memory = suspect, out_of_memory


@dataclass(frozen=True)
class GroupSpec:
    """What a group is started with; see `messages.Load`. `threads` is per rank."""

    path: str
    world: int
    device: str
    dtype: str
    checkpoint_dtype: str
    threads: int


@dataclass
class _Pending:
    command: m.Acknowledged
    started: float | None = None  # of `time.monotonic()`, when the ranks came to it
    done: dict[int, m.Done] = field(default_factory=dict)
    future: asyncio.Future[list[m.Done]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    pidfd: int
    socket: zmq.asyncio.Socket
    state: str = "starting"
    info: m.EncoderInfo | None = None
    reader: asyncio.Task[None] | None = None


class RankGroup:
    """Start, feed, watch and stop N ranks. Owns their processes and sockets; `stop` releases everything.

    `lost` is set, once, with the reason when the group can no longer be trusted; only `stop` makes sense then.
    """

    def __init__(self, spec: GroupSpec, arena: Arena, on_progress: Callable[[int, str], None]) -> None:
        self._spec, self._arena, self._on_progress = spec, arena, on_progress
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = loop.create_future()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._context = zmq.asyncio.Context(io_threads=1)
        self._ranks: list[_Rank] = []
        self._pending: dict[int, _Pending] = {}  # in the order sent, which is the order executed
        self._seq = itertools.count(1)

    @property
    def states(self) -> list[str]:
        """Per rank: starting, a loading step, ready or dead."""
        return [rank.state for rank in self._ranks]

    def oldest(self) -> tuple[m.Acknowledged, float] | None:
        """The command that has been executed for longest, and for how many seconds; None when the ranks are idle."""
        if not self._pending:
            return None
        first = next(iter(self._pending.values()))
        assert first.started is not None
        return first.command, time.monotonic() - first.started

    async def start(self, timeout: float) -> m.EncoderInfo:
        """Spawn the ranks and wait until all are ready. Raises StartupError; the caller then calls `stop`."""
        directory = RunDirectory()
        store = os.memfd_create("encode-server-store")
        try:
            self._spawn(directory, store)
            async with asyncio.timeout(timeout):
                await asyncio.wait((self._ready, self.lost), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise StartupError(f"the ranks were not ready after {timeout:g} s: {', '.join(self.states)}") from None
        finally:
            # All are connected, or nobody will: a directory that is gone cannot be left behind.
            directory.remove()
            os.close(store)
        if self.lost.done():
            raise StartupError(self.lost.result())
        infos = [rank.info for rank in self._ranks]
        assert infos[0] is not None
        return infos[0]

    async def forward(self, modality: Modality, items: tuple[m.ItemRef, ...]) -> list[m.Done]:
        """Run one batch on every rank. Returns each rank's acknowledgement. Raises GroupLost."""
        return await self._call(m.Forward(next(self._seq), modality, items))

    async def ping(self) -> None:
        """Have every rank answer. Raises GroupLost."""
        await self._call(m.Ping(next(self._seq)))

    async def start_profile(self, path: str, forwards: int | None) -> list[m.Done]:
        """Have every rank record, see `messages.StartProfile`. Raises GroupLost."""
        return await self._call(m.StartProfile(next(self._seq), path, forwards))

    async def stop_profile(self) -> list[m.Done]:
        """Have every rank write its trace. Raises GroupLost."""
        return await self._call(m.StopProfile(next(self._seq)))

    def fail(self, reason: str) -> None:
        """Declare the group lost: everything in flight raises GroupLost."""
        if self.lost.done():
            return
        self.lost.set_result(reason)
        for pending in self._pending.values():
            if not pending.future.done():
                pending.future.set_exception(GroupLost(reason, suspect=pending.started is not None))
                pending.future.exception()  # its caller may be gone

    async def stop(self, grace: float = 5.0) -> None:
        """End every rank (politely if the group is sound, else at once), reap them, close the sockets."""
        polite = self._ready.done() and not self.lost.done()
        self.fail("the group was stopped")
        for rank in self._ranks:
            asyncio.get_running_loop().remove_reader(rank.pidfd)
            if polite:
                with contextlib.suppress(zmq.Again):  # it has just died: to wait for it would be for ever
                    await rank.socket.send(m.encode(m.Shutdown()), flags=zmq.NOBLOCK)
            else:
                rank.process.kill()
        deadline = time.monotonic() + grace
        for rank in self._ranks:
            try:
                await asyncio.to_thread(rank.process.wait, max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                await asyncio.to_thread(rank.process.wait)
            if rank.reader is not None:
                rank.reader.cancel()
            rank.socket.close(linger=0)
            os.close(rank.pidfd)
        self._ranks.clear()
        self._context.destroy(linger=0)  # with a socket whose rank could not be started

    def _spawn(self, directory: RunDirectory, store: int) -> None:
        for index in range(self._spec.world):
            path = directory.path / f"rank{index}.sock"
            socket = self._context.socket(zmq.PAIR)
            socket.set_hwm(0)  # commands are few and small, and none may be dropped
            socket.bind(f"ipc://{path}")
            process = spawn_rank(path, index, fds=(self._arena.fd, store), threads=self._spec.threads)
            rank = _Rank(process, os.pidfd_open(process.pid), socket)
            self._ranks.append(rank)
            asyncio.get_running_loop().add_reader(rank.pidfd, self._on_exit, index)
            rank.reader = asyncio.create_task(self._read(index, store))

    async def _call(self, command: m.Acknowledged) -> list[m.Done]:
        if self.lost.done():
            raise GroupLost(self.lost.result())
        pending = _Pending(command)
        self._pending[command.seq] = pending
        self._note_started()
        frame = m.encode(command)
        task = asyncio.current_task()
        try:
            for rank in self._ranks:
                await rank.socket.send(frame)  # no high-water mark: waits only for a rank that is gone
            # The ranks will execute it whatever happens to the caller, so its cancellation does not end the wait.
            return await asyncio.shield(pending.future)
        except asyncio.CancelledError:
            if self.lost.done() and not (task and task.cancelling()):
                # Not this caller's: the socket to a dead rank was closed while the command waited to be sent.
                raise GroupLost(self.lost.result()) from None
            raise

    async def _read(self, index: int, store: int) -> None:
        rank = self._ranks[index]
        while True:
            try:
                event = m.decode_event(await rank.socket.recv())
            except msgspec.MsgspecError as error:
                self.fail(f"rank {index} sent what is no message: {error}")
                return
            match event:
                case m.Hello():
                    await rank.socket.send(m.encode(self._load(index, store)))
                case m.Progress(_, step):
                    rank.state = step
                    self._on_progress(index, step)
                case m.Ready(_, info):
                    rank.state, rank.info = "ready", info
                    self._on_progress(index, "ready")
                    if all(r.info is not None for r in self._ranks) and not self._ready.done():
                        self._ready.set_result(None)
                case m.Done():
                    self._acknowledge(event)
                case m.Failed(_, message):
                    rank.state = "failed"
                    self.fail(message)

    def _load(self, index: int, store: int) -> m.Load:
        spec = self._spec
        return m.Load(
            path=spec.path,
            rank=index,
            world=spec.world,
            device=spec.device,
            dtype=spec.dtype,
            checkpoint_dtype=spec.checkpoint_dtype,
            threads=spec.threads,
            arena_fd=self._arena.fd,
            arena_bytes=self._arena.size,
            store_fd=store,
        )

    def _acknowledge(self, done: m.Done) -> None:
        pending = self._pending.get(done.seq)
        if pending is None:
            self.fail(f"rank {done.rank} acknowledged command {done.seq}, which is not in flight")
            return
        pending.done[done.rank] = done
        forward = isinstance(pending.command, m.Forward)
        if len(pending.done) < len(self._ranks):
            if done.error and forward:
                asyncio.get_running_loop().call_later(PEERS_S, self._fail_divided, pending)
        elif forward and len({bool(one.error) for one in pending.done.values()}) > 1:
            self._fail_divided(pending)
        else:
            del self._pending[done.seq]
            self._note_started()
            if not pending.future.done():
                pending.future.set_result([pending.done[index] for index in sorted(pending.done)])

    def _fail_divided(self, pending: _Pending) -> None:
        """Some ranks left the forward before its last collective: the next one's would be paired wrongly."""
        if self.lost.done() or pending.command.seq not in self._pending:
            return
        reason = f"command {pending.command.seq} failed on some ranks only: {_first_error(pending.done)}"
        if not pending.future.done():
            out_of_memory = any(one.out_of_memory for one in pending.done.values())
            pending.future.set_exception(GroupLost(reason, suspect=True, out_of_memory=out_of_memory))
            pending.future.exception()
        self.fail(reason)

    def _note_started(self) -> None:
        """The ranks start commands in the order sent, so many at once."""
        info = self._ranks[0].info
        for pending in itertools.islice(self._pending.values(), info.at_once if info else 1):
            if pending.started is None:
                pending.started = time.monotonic()
            if not isinstance(pending.command, m.Forward):
                break  # nothing overtakes it

    def _on_exit(self, index: int) -> None:
        rank = self._ranks[index]
        asyncio.get_running_loop().remove_reader(rank.pidfd)
        code = rank.process.wait()
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._on_gone, rank, f"rank {index} exited with {how}")

    def _on_gone(self, rank: _Rank, reason: str) -> None:
        if not self.lost.done() and int(rank.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # this loop was held up
            asyncio.get_running_loop().call_later(LAST_WORDS_S, self._on_gone, rank, reason)
            return
        rank.state = "dead"
        self.fail(reason)


def _first_error(done: Mapping[int, m.Done]) -> str:
    return next(one.error for one in done.values() if one.error)
