"""A forked child process and the front's link to it, opened and closed together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import zmq

from encode_server.errors import StartupError
from encode_server.runtime.forkserver import Child, Forkserver
from encode_server.runtime.link import Link

STUCK_S = 10.0  # after SIGKILL; a process that is still there sleeps in the kernel, where no signal reaches it
LAST_WORDS_S = 0.2  # what a child that exited by itself says of why may still be on its way


class Unkillable(StartupError):
    """A process stays after SIGKILL. What it maps may change under whoever uses that memory next."""


class Peer:
    """Owner of one child process and of the link to it. `close` releases both; `exited` is the child's exit code, set
    once the process is gone and its last words have been heard."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], on_message: Callable[[list[bytes]], None]) -> None:
        self.link = Link(context, on_message)
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        """The process, None before its fork."""
        return self._child.pid if self._child else None

    async def start(self, forkserver: Forkserver, name: str, entry: str, argument: bytes, fds: Sequence[int]) -> None:
        """Fork the child, see `Forkserver.fork`. Raises ForkserverLost."""
        self._child = await forkserver.fork(name, entry, argument, fds)
        self._child.exited.add_done_callback(self._on_exit)

    def kill(self) -> None:
        """Send SIGKILL."""
        if self._child is not None:
            self._child.kill()

    async def close(self, grace_s: float = 0.0) -> None:
        """Wait `grace_s` for the child to exit, kill it if it did not, and wait until it is gone. Never interrupted
        half way by a cancellation: half of a close leaves a process that nobody owns.

        Raises Unkillable."""
        task = asyncio.create_task(self._close(grace_s))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await task
            raise

    async def _close(self, grace_s: float) -> None:
        if self._child is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await asyncio.shield(self._child.exited)
            self._child.kill()
            try:
                async with asyncio.timeout(STUCK_S):
                    await asyncio.shield(self._child.exited)
            except TimeoutError:
                raise Unkillable(f"process {self._child.pid} cannot be killed: its driver or its disk hangs") from None
            finally:
                self.link.close()
        else:
            self.link.close()

    def _on_exit(self, exited: asyncio.Future[int]) -> None:
        code = exited.result()
        # A process that a signal ended had no last words.
        wait_s = LAST_WORDS_S if code >= 0 else 0.0
        asyncio.get_running_loop().call_later(wait_s, self._settle, code)

    def _settle(self, code: int) -> None:
        self.link.drain()
        if not self.exited.done():
            self.exited.set_result(code)
