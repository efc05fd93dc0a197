"""A group of rank processes that execute one stream of commands, and the front's view of how far they are."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec
import zmq

from encode_server.engine.arena import Arena
from encode_server.errors import StartupError
from encode_server.runtime.forkserver import Forkserver
from encode_server.runtime.outside import OomKills, killed_from_outside, stopped_from_outside
from encode_server.runtime.peer import Peer
from encode_server.runtime.progress import Waited, starved_seconds, waited
from encode_server.wire import ranks as m
from encode_server.wire.checkpoint import Facts
from encode_server.wire.modality import Modality

ENTRY = "encode_server.engine.rank:main"

LOOK_S = 1.0
"""Seconds from which a command is looked at closely: /proc is not read for those that end sooner."""

PEERS_S = 2.0
"""Time for other ranks to report the same failure; a rank still silent after it is stuck in a collective."""


class Cause(StrEnum):
    """Why a group was lost, in one word, for counting."""

    DIED = "died"  # a rank's process ended
    HANG = "hang"  # a command was not acknowledged in time
    FAILED = "failed"  # a rank said that it cannot go on
    DIVIDED = "divided"  # a forward failed on some ranks only
    GARBLED = "garbled"  # a rank sent what makes no sense
    NOT_STARTED = "not_started"  # the ranks could not be forked, or did not load in time


class GroupLost(Exception):
    """The ranks died, hang or stopped making sense. What was in flight has not been delivered.

    `suspect`: the command was being executed, so the command may be the cause. `out_of_memory`: the command is the
    cause, for lack of memory. `outside`: as far as can be known, somebody outside of the server ended or
    stopped a rank.
    """

    def __init__(
        self, reason: str, *, suspect: bool = False, out_of_memory: bool = False, outside: bool = False
    ) -> None:
        super().__init__(reason)
        self.suspect, self.out_of_memory, self.outside = suspect, out_of_memory, outside


@dataclass(frozen=True)
class GroupSpec:
    """What a group is started with; see `wire.ranks.RankSetup`. `threads` is per rank. `index`: of the group, among
    `groups` of them side by side; their ranks take the devices in order."""

    path: str
    world: int
    device: str
    dtype: str
    checkpoint_dtype: str
    threads: int
    facts: Facts | None = None
    tf32: bool = False
    flash_attention: str = "2"
    index: int = 0
    groups: int = 1

    @property
    def prefix(self) -> str:
        """What names the group in the log; nothing where it is the only one."""
        return f"group {self.index}: " if self.groups > 1 else ""

    def rank_name(self, rank: int) -> str:
        """What `ps` shows."""
        return f"rank {self.index}.{rank}" if self.groups > 1 else f"rank {rank}"


@dataclass
class Pending:
    """A command that the ranks have not all acknowledged. `expected_s`: how long a forward should take, None where
    nothing is known. `started`: of `time.monotonic()`, when the ranks came to it. `oom_kills`: what
    `OomKills.count` gave then."""

    command: m.Acknowledged
    expected_s: float | None = None
    started: float | None = None
    oom_kills: int | None = None
    done: dict[int, m.Done] = field(default_factory=dict)
    waited: dict[int, Waited] = field(default_factory=dict)  # by rank's process, at the first look at its age
    future: asyncio.Future[list[m.Done]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass
class _Rank:
    peer: Peer
    state: str = "starting"
    info: m.EncoderInfo | None = None
    memory: m.DeviceMemory | None = None


class RankGroup:
    """Start, feed, watch and stop N ranks. Owns their processes and links; `stop` releases everything.

    `lost` is set, once, with the reason when the group can no longer be trusted; only `stop` makes sense then. `gone`
    is set once `stop` has ended every process: nothing of the group touches the arena any more.
    """

    def __init__(
        self,
        spec: GroupSpec,
        forkserver: Forkserver,
        arena: Arena,
        on_progress: Callable[[int, str], None],
        on_warning: Callable[[int, str], None],
    ) -> None:
        self._spec, self._forkserver, self._arena = spec, forkserver, arena
        self._on_progress, self._on_warning = on_progress, on_warning
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._oom_kills = OomKills()
        self._ranks: list[_Rank] = []
        self._pending: dict[int, Pending] = {}  # in the order sent, which is the order executed
        self._seq = itertools.count(1)
        self.cause = Cause.NOT_STARTED  # of the loss
        self.forwarded = 0  # forwards that all ranks have ended without an error

    @property
    def states(self) -> list[str]:
        """Per rank: starting, a loading step, ready or dead."""
        return [rank.state for rank in self._ranks]

    @property
    def pids(self) -> list[int | None]:
        """Per rank, None before the rank has been forked."""
        return [rank.peer.pid for rank in self._ranks]

    @property
    def memory(self) -> list[m.DeviceMemory | None]:
        """Per rank, what its device's memory was when the rank said so last; None on a CPU, and before."""
        return [rank.memory for rank in self._ranks]

    def oldest(self) -> Pending | None:
        """The command that has been executed for longest; None when the ranks are idle."""
        return next(iter(self._pending.values()), None)

    async def start(self, timeout: float) -> m.EncoderInfo:
        """Fork the ranks and wait until all are ready. Raises StartupError, ForkserverLost; the caller then calls
        `stop`."""
        store = os.memfd_create("encode-server-store")
        try:
            async with asyncio.timeout(timeout):
                for index in range(self._spec.world):
                    await self._fork(index, store)
                await asyncio.wait((self._ready, self.lost), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise StartupError(f"the ranks were not ready after {timeout:g} s: {', '.join(self.states)}") from None
        finally:
            os.close(store)
        if self.lost.done():
            raise StartupError(self.lost.result())
        info = self._ranks[0].info
        assert info is not None
        return info

    async def forward(
        self, modality: Modality, items: tuple[m.ItemRef, ...], expected_s: float | None = None
    ) -> list[m.Done]:
        """Run one batch on every rank. Returns each rank's acknowledgement. Raises GroupLost."""
        return await self._call(m.Forward(next(self._seq), modality, items), expected_s)

    async def ping(self) -> None:
        """Have every rank answer. Raises GroupLost."""
        await self._call(m.Ping(next(self._seq)))

    async def start_profile(self, path: str, forwards: int | None) -> list[m.Done]:
        """Have every rank record, see `wire.ranks.StartProfile`. Raises GroupLost."""
        return await self._call(m.StartProfile(next(self._seq), path, forwards))

    async def stop_profile(self) -> list[m.Done]:
        """Have every rank end its profile and begin to write its trace. Raises GroupLost."""
        return await self._call(m.StopProfile(next(self._seq)))

    def age_s(self, pending: Pending) -> float:
        """Seconds that the ranks have had for the command: since they came to it, less what a rank that has not
        acknowledged it waited for a core meanwhile. A starved machine is slow, and does not hang."""
        if pending.started is None:
            return 0.0
        age = time.monotonic() - pending.started
        if age < LOOK_S:
            return age
        late = [rank.peer.pid for index, rank in enumerate(self._ranks) if index not in pending.done and rank.peer.pid]
        if not pending.waited:
            pending.waited = {pid: waited(pid) for pid in late}
        return max(0.0, age - max((starved_seconds(pid, pending.waited.get(pid, {})) for pid in late), default=0.0))

    def stopped_from_outside(self) -> bool:
        """Whether a rank stands still because somebody stopped it."""
        return any(rank.peer.pid is not None and stopped_from_outside(rank.peer.pid) for rank in self._ranks)

    def fail(self, reason: str, cause: Cause, *, outside: bool = False) -> None:
        """Declare the group lost: everything in flight raises GroupLost. `outside`: see there."""
        if self.lost.done():
            return
        self.cause = cause
        self.lost.set_result(reason)
        for pending in self._pending.values():
            if not pending.future.done():
                suspect = pending.started is not None
                pending.future.set_exception(GroupLost(reason, suspect=suspect, outside=outside))
                pending.future.exception()  # the caller may be gone

    async def stop(self, grace_s: float = 5.0) -> None:
        """End every rank (politely if the group is sound, else immediately), wait until all are gone, close the
        links. Raises Unkillable when a process stays."""
        polite = self._ready.done() and not self.lost.done()
        self.fail("the group was stopped", self.cause)
        for rank in self._ranks:
            if polite:
                rank.peer.link.send(m.encode(m.Shutdown()))
            else:
                rank.peer.kill()
        closing = (rank.peer.close(grace_s if polite else 0.0) for rank in self._ranks)
        ends = await asyncio.gather(*closing, return_exceptions=True)
        self._ranks.clear()
        self._context.destroy(linger=0)
        for end in ends:
            if isinstance(end, BaseException):
                raise end
        self.gone.set_result(None)

    async def _fork(self, index: int, store: int) -> None:
        peer = Peer(self._context, lambda frames: self._on_event(index, frames[0]))
        rank = _Rank(peer)
        self._ranks.append(rank)
        spec = self._spec
        setup = m.RankSetup(
            socket=peer.link.path,
            path=spec.path,
            rank=index,
            world=spec.world,
            device=spec.device,
            dtype=spec.dtype,
            checkpoint_dtype=spec.checkpoint_dtype,
            threads=spec.threads,
            arena_bytes=self._arena.size,
            facts=spec.facts,
            device_index=spec.index * spec.world + index,
            devices=spec.groups * spec.world,
            tf32=spec.tf32,
            flash_attention=spec.flash_attention,
        )
        fds = (self._arena.fd, store)
        argument = msgspec.msgpack.encode(setup)
        await peer.start(self._forkserver, spec.rank_name(index), ENTRY, argument, fds)
        peer.exited.add_done_callback(lambda exited: self._on_exit(index, rank, exited.result()))

    async def _call(self, command: m.Acknowledged, expected_s: float | None = None) -> list[m.Done]:
        if self.lost.done():
            raise GroupLost(self.lost.result())
        pending = Pending(command, expected_s)
        self._pending[command.seq] = pending
        self._note_started()
        frame = m.encode(command)
        for rank in self._ranks:
            rank.peer.link.send(frame)
        return await asyncio.shield(pending.future)

    def _on_event(self, index: int, frame: bytes) -> None:
        try:
            event = m.decode_event(frame)
        except msgspec.MsgspecError as error:
            self.fail(f"rank {index} sent what is no message: {error}", Cause.GARBLED)
            return
        rank = self._ranks[index]
        match event:
            case m.Progress(_, step):
                rank.state = step
                self._on_progress(index, step)
            case m.Warned(_, message):
                self._on_warning(index, message)
            case m.Ready(_, info):
                rank.state, rank.info = "ready", info
                self._on_progress(index, "ready")
                if all(r.info is not None for r in self._ranks) and len(self._ranks) == self._spec.world:
                    self._ready.set_result(None)
            case m.Done():
                self._acknowledge(event)
            case m.Failed(_, message):
                rank.state = "failed"
                self.fail(message, Cause.FAILED)

    def _acknowledge(self, done: m.Done) -> None:
        pending = self._pending.get(done.seq)
        if pending is None:
            self.fail(f"rank {done.rank} acknowledged command {done.seq}, which is not in flight", Cause.GARBLED)
            return
        pending.done[done.rank] = done
        if done.memory is not None:
            self._ranks[done.rank].memory = done.memory
        forward = isinstance(pending.command, m.Forward)
        if len(pending.done) < len(self._ranks):
            if done.error and forward:
                asyncio.get_running_loop().call_later(PEERS_S, self._fail_divided, pending)
        elif forward and len({bool(one.error) for one in pending.done.values()}) > 1:
            self._fail_divided(pending)
        else:
            was_oldest = self.oldest() is pending
            del self._pending[done.seq]
            self.forwarded += forward and not done.error
            self._note_started()
            info, oldest = self._ranks[0].info, self.oldest()
            if was_oldest and oldest is not None and info is not None and info.computing == 1:
                oldest.started = time.monotonic()  # until now it was only queued on the device
            if not pending.future.done():
                pending.future.set_result([pending.done[index] for index in sorted(pending.done)])

    def _fail_divided(self, pending: Pending) -> None:
        """Some ranks left the forward before its last collective: the next forward's would be paired wrongly."""
        if self.lost.done() or pending.command.seq not in self._pending:
            return
        reason = f"command {pending.command.seq} failed on some ranks only: {_first_error(pending.done)}"
        if not pending.future.done():
            out_of_memory = any(one.out_of_memory for one in pending.done.values())
            pending.future.set_exception(GroupLost(reason, suspect=True, out_of_memory=out_of_memory))
            pending.future.exception()
        self.fail(reason, Cause.DIVIDED)

    def _note_started(self) -> None:
        """The ranks start commands in the order sent, as many side by side as they say."""
        info = self._ranks[0].info
        for pending in itertools.islice(self._pending.values(), info.at_once if info else 1):
            if pending.started is None:
                pending.started = time.monotonic()
                pending.oom_kills = self._oom_kills.count()
            if not isinstance(pending.command, m.Forward):
                break  # nothing overtakes it

    def _on_exit(self, index: int, rank: _Rank, code: int) -> None:
        rank.state = "dead"
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        # The first rank to exit: this server itself kills ranks of a lost group only.
        oldest = self.oldest()
        outside = killed_from_outside(code, oldest.oom_kills if oldest else None, self._oom_kills.count())
        self.fail(f"rank {index} exited with {how}", Cause.DIED, outside=outside)


def _first_error(done: Mapping[int, m.Done]) -> str:
    return next(one.error for one in done.values() if one.error)
