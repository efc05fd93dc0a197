"""The front's side of the forkserver: start it, have it fork children, hear how they end.

Python's own forkserver (`multiprocessing.forkserver`) stands in the way of four things this server needs: its socket is
a file that a killed front leaves behind; it outlives the front for as long as any child lives, so the kernel's
parent-death signal cannot end a hanging child; a fork blocks the caller while the forkserver still imports; and each
child imports the program's main module again. Here the forkserver is a process of ours (`runtime.forkserver_process`)
at the other end of a socket pair that has no name.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from encode_server.errors import StartupError
from encode_server.runtime.environment import forkserver_environment
from encode_server.wire.forks import LARGEST, Exited, Fork, Forked, decode_event, encode

log = logging.getLogger(__name__)

MAX_RESTARTS_IN_A_ROW = 5  # of a forkserver that never forked a child: the installation does not work


class ForkserverLost(Exception):
    """The forkserver ended before the fork that was asked of it."""


class Child:
    """A process that the forkserver forked.

    `exited` ends with the exit code (minus the signal's number for a process that a signal ended) once the kernel says
    that the process is gone: nothing of it touches shared memory any more.
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._code: int | None = None
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(pidfd, self._on_exit)

    def kill(self) -> None:
        """Send SIGKILL; `exited` says when the process is gone."""
        if self._pidfd >= 0:  # else the process is gone, though `exited` may not say so yet
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def report(self, code: int) -> None:
        """The forkserver's word on how the process ended."""
        self._code = code
        if self._pidfd < 0 and not self.exited.done():
            self.exited.set_result(code)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._code is not None:
            self.exited.set_result(self._code)
        else:  # the forkserver's report of the exit code follows, unless the forkserver is gone too
            asyncio.get_running_loop().call_later(0.2, self._give_up_code)

    def _give_up_code(self) -> None:
        if not self.exited.done():
            self.exited.set_result(-signal.SIGKILL)


@dataclass(frozen=True)
class Launched:
    """A forkserver process that imports, and the front's end of the socket pair to it."""

    process: subprocess.Popen[bytes]
    socket: socket.socket


def launch(setup: str, argument: bytes = b"") -> Launched:
    """Start a forkserver process: it calls `setup` (`module:function`) with `argument` before its first fork, and that
    function imports what children will need.

    Needs no event loop. Call this function on the main thread: the kernel's parent-death signal follows the thread that
    started the process.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with theirs:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "encode_server.runtime.forkserver_process"),
                *("--socket", str(theirs.fileno()), "--parent", str(os.getpid()), "--setup", setup),
                *("--argument", argument.hex()),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            process_group=0,  # the terminal's Ctrl-C is the front's to act on
            env=forkserver_environment(),
        )
    return Launched(process, ours)


class Forkserver:
    """Owner of the forkserver process. `run` lives as long as the server; `fork` and `call` may be called any time.

    `setup` and `argument`: see `launch`. `launched`: a process that was started so before, to begin with. Every child
    ends when the forkserver ends, and the forkserver when this process does.
    """

    def __init__(self, setup: str, argument: bytes = b"", launched: Launched | None = None) -> None:
        self._setup, self._argument, self._launched = setup, argument, launched
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Child]] = {}
        self._children: dict[int, Child] = {}
        self._lost: asyncio.Event = asyncio.Event()
        self._started = asyncio.Event()
        self.forked = 0

    @property
    def pid(self) -> int | None:
        """The process, None before its start."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process, or take on the one that was launched. Call this method on the main thread."""
        launched, self._launched = self._launched or launch(self._setup, self._argument), None
        self._process, self._socket = launched.process, launched.socket
        self._lost.clear()
        self._started.set()
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._read)

    async def run(self) -> None:
        """Start the process again whenever it is lost, until cancelled. Raises StartupError when it never works."""
        barren = 0
        try:
            while True:
                forked = self.forked
                if self._process is None:
                    self.start()
                await self._lost.wait()
                assert self._process is not None
                code = await asyncio.to_thread(self._process.wait)
                self._process = None
                barren = barren + 1 if self.forked == forked else 0
                if barren > MAX_RESTARTS_IN_A_ROW:
                    raise StartupError(f"the process that forks ranks and preparers ends with code {code} each time")
                log.error("the forkserver ended with code %d; starting it again", code)
        finally:
            await self._stop()

    async def fork(self, name: str, entry: str, argument: bytes, fds: Sequence[int] = ()) -> Child:
        """A child called `name` (for `ps`) that runs `entry` (`module:function`) with `argument` (64 KiB at most) and
        copies of `fds`.

        Waits while the forkserver imports. A child whose caller is cancelled meanwhile is killed. Raises
        ForkserverLost.
        """
        await self._started.wait()
        if self._socket is None:
            raise ForkserverLost("the forkserver is not running")
        number = next(self._numbers)
        asked: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        try:
            socket.send_fds(self._socket, [encode(Fork(number, name, entry, argument))], list(fds))
        except OSError as error:
            del self._asked[number]
            raise ForkserverLost(f"the forkserver cannot be reached: {error.strerror}") from None
        try:
            return await asked
        except asyncio.CancelledError:
            if asked.done() and not asked.cancelled() and asked.exception() is None:
                asked.result().kill()
            raise

    async def call(self, function: str, argument: Any, kind: type[Any]) -> Any:
        """Run `function` (`module:function`, on msgpack's idea of `argument`) in a child of its own; its result, of
        type `kind`.

        Raises StartupError when the function raises that, or when the child ends without a result; ForkserverLost
        when the child ended with the forkserver.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours:
            with theirs:
                payload = msgspec.msgpack.encode((function, msgspec.msgpack.encode(argument)))
                child = await self.fork("call", "encode_server.runtime.calls:answer", payload, (theirs.fileno(),))
            parent = self._socket
            answer = bytearray()
            try:
                while chunk := await asyncio.get_running_loop().sock_recv(ours, 1 << 20):
                    answer += chunk
            except BaseException:
                child.kill()
                raise
        code = await child.exited
        if code < 0 and self._socket is not parent:
            raise ForkserverLost("the forkserver ended, and the call with it")
        if not answer:
            raise StartupError(f"{function} ended with code {code} and said nothing")
        ok, value = msgspec.msgpack.decode(answer, type=tuple[bool, msgspec.Raw])
        if not ok:
            raise StartupError(msgspec.msgpack.decode(value, type=str))
        return msgspec.msgpack.decode(value, type=kind)

    def _read(self) -> None:
        assert self._socket is not None
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, LARGEST, 4)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self._on_lost()
                return
            match decode_event(data):
                case Forked(number, pid):
                    self._on_forked(number, pid, fds[0])
                case Exited(pid, code):
                    if (child := self._children.pop(pid, None)) is not None:
                        child.report(code)

    def _on_forked(self, number: int, pid: int, pidfd: int) -> None:
        self.forked += 1
        child = Child(pid, pidfd)
        self._children[pid] = child
        asked = self._asked.pop(number)
        if asked.done():  # nobody waits for it any more
            child.kill()
        else:
            asked.set_result(child)

    def _on_lost(self) -> None:
        self._close_socket()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(ForkserverLost("the forkserver ended"))
                asked.exception()
        self._asked.clear()
        self._children.clear()  # the kernel kills them; their pidfds say when they are gone
        self._lost.set()

    def _close_socket(self) -> None:
        self._started.clear()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    async def _stop(self) -> None:
        self._close_socket()  # the forkserver ends when the socket does
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            self._process = None
