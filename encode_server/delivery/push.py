"""Push frames over ZMQ: one PUSH socket per destination, kept while used, frames sent in order and without a copy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq
import zmq.asyncio

from encode_server.errors import DeliveryFailed

IDLE_S = 60.0  # a destination nobody used for so long is forgotten
MAX_IDLE = 64  # destinations kept beyond those in use: some callers have a port of its own for every request
NOTICE_S = 5.0  # longest try to tell a destination of a failure
CONNECT_S = 0.25  # first try to connect; each one after takes twice as long
MAX_CONNECT_S = 4.0
LINGER_MS = 250  # at the end, for small frames that libzmq copied and has not written yet

Frames = Sequence[bytes | memoryview]


@dataclass(eq=False)
class _Message:
    frames: Frames
    deadline: float  # of the loop's clock
    sent: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, why: str) -> None:
        if not self.sent.done():
            self.sent.set_exception(DeliveryFailed(why))


class Pusher:
    """Owner of the PUSH sockets. A slow or dead destination holds back nobody but those who push to it.

    The frames' memory must not change while libzmq may hold it; it does so until it has sent them or given up, and
    keeps a reference as long.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._context = zmq.asyncio.Context(io_threads=2)
        self._context.set(zmq.MAX_SOCKETS, 8192)
        self._destinations: dict[str, _Destination] = {}  # the one used last is the last

    async def push(self, endpoint: str, frames: Frames) -> None:
        """Send one multipart message to `tcp://address:port`; returns when the destination's host has taken it.

        Messages to one destination go in the order of the calls. One that is cancelled before its turn is never sent.
        Raises DeliveryFailed when the destination does not take it in time or goes away meanwhile.
        """
        message = self._queue(endpoint, frames, self.timeout_s)
        try:
            await message.sent
        finally:
            message.frames = ()

    def notify(self, endpoint: str, frames: Frames) -> None:
        """Send a small message for which nobody waits; a destination that takes none is not told."""
        message = self._queue(endpoint, frames, min(NOTICE_S, self.timeout_s))
        message.sent.add_done_callback(lambda sent: sent.cancelled() or sent.exception())

    def close(self) -> None:
        """Close every socket. What is not sent fails."""
        for destination in self._destinations.values():
            destination.close()
        self._destinations.clear()
        self._context.destroy(linger=LINGER_MS)  # `term` would wait forever for a socket that was overlooked

    def _queue(self, endpoint: str, frames: Frames, timeout_s: float) -> _Message:
        destination = self._destinations.pop(endpoint, None) or _Destination(self._context, endpoint, self._forget)
        self._destinations[endpoint] = destination
        message = _Message(frames, asyncio.get_running_loop().time() + timeout_s)
        destination.queue(message)
        if len(self._destinations) > MAX_IDLE:
            idle = [other for other in self._destinations.values() if other.idle]
            for other in idle[:-MAX_IDLE]:
                other.close()
                self._forget(other)
        return message

    def _forget(self, destination: _Destination) -> None:
        if self._destinations.get(destination.endpoint) is destination:
            del self._destinations[destination.endpoint]


class _Destination:
    """One endpoint: its queue, its socket, and the task that sends from the one through the other, one by one.

    One by one, so that giving up on a message, by closing the socket, takes no other with it. The kernel's buffer keeps
    the line busy between two.
    """

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, on_idle: Callable[[_Destination], None]) -> None:
        self.endpoint = endpoint
        self._context, self._on_idle = context, on_idle
        self._messages: asyncio.Queue[_Message] = asyncio.Queue()
        self._current: _Message | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._task = asyncio.create_task(self._run())

    @property
    def idle(self) -> bool:
        """Nothing is queued or being sent."""
        return self._current is None and self._messages.empty()

    def queue(self, message: _Message) -> None:
        self._messages.put_nowait(message)

    def close(self) -> None:
        self._task.cancel()
        self._disconnect(LINGER_MS)
        if self._current is not None:
            self._current.fail("the server is stopping")
        while not self._messages.empty():
            self._messages.get_nowait().fail("the server is stopping")

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    self._current = await self._messages.get()
            except TimeoutError:
                if self._messages.empty():
                    self._on_idle(self)
                    self._disconnect(LINGER_MS)
                    return
                continue
            await self._send(self._current)
            self._current = None

    async def _send(self, message: _Message) -> None:
        late = "the destination did not take the embedding in time"
        if asyncio.get_running_loop().time() >= message.deadline:
            message.fail(late)
            return
        try:
            async with asyncio.timeout_at(message.deadline):
                socket = await self._connected()
                if message.sent.done():  # its caller has gone
                    return
                tracker = await socket.send_multipart(list(message.frames), copy=False, track=True)
                assert isinstance(tracker, zmq.MessageTracker)
                await _released(tracker)
        except (TimeoutError, zmq.ZMQError):
            self._disconnect(0)
            message.fail(late)
            return
        # libzmq lets go of the frames of a connection that breaks as well, and only then cannot be written to.
        if not _writable(socket):
            self._disconnect(0)
            message.fail("the destination went away while the embedding was sent")
        elif not message.sent.done():
            message.sent.set_result(None)

    async def _connected(self) -> zmq.asyncio.Socket:
        """A socket whose peer is there, however often it takes to connect."""
        patience = CONNECT_S
        while True:
            if self._socket is None:
                self._socket = self._connect()
            if _writable(self._socket) or await _poll(self._socket, patience):
                return self._socket
            self._disconnect(0)
            patience = min(patience * 2, MAX_CONNECT_S)

    def _connect(self) -> zmq.asyncio.Socket:
        socket = self._context.socket(zmq.PUSH)
        # Only to peers that are there: a message queued for nobody would count as sent. And no reconnecting by itself:
        # it would hide a break, and never end for a port that is gone for good.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, int("[" in self.endpoint))
        # A host that loses power says nothing: ask after 15 s, give up after another 15.
        for option, value in (
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.TCP_KEEPALIVE_IDLE, 15),
            (zmq.TCP_KEEPALIVE_INTVL, 5),
            (zmq.TCP_KEEPALIVE_CNT, 3),
        ):
            socket.setsockopt(option, value)
        socket.connect(self.endpoint)
        return socket

    def _disconnect(self, linger_ms: int) -> None:
        if self._socket is not None:
            self._socket.close(linger=linger_ms)
            self._socket = None


async def _released(tracker: zmq.MessageTracker) -> None:
    """Return once libzmq no longer needs the memory of the frames."""
    delay = 0.0001
    while not tracker.done:
        await asyncio.sleep(delay)
        delay = min(delay * 2, 0.001)


def _writable(socket: zmq.asyncio.Socket) -> bool:
    return not socket.closed and bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT)


async def _poll(socket: zmq.asyncio.Socket, timeout_s: float) -> bool:
    """Whether the socket can be written to in time."""
    events = await socket.poll(int(timeout_s * 1000), zmq.POLLOUT)  # type: ignore[call-arg]  # as zmq.asyncio has it
    return bool(events)
