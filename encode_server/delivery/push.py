"""Push frames over ZMQ: one PUSH socket per destination, kept while used, frames sent without a copy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import zmq
import zmq.asyncio

from encode_server.errors import DeliveryFailed

IDLE_S = 60.0  # a socket nobody used for so long is closed


@dataclass
class _Destination:
    socket: zmq.asyncio.Socket
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    used: float = field(default_factory=time.monotonic)
    users: int = 0


class Pusher:
    """Owner of the PUSH sockets. A slow or dead destination holds back nobody but those who push to it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._context = zmq.asyncio.Context(io_threads=2)
        self._destinations: dict[str, _Destination] = {}

    async def push(self, endpoint: str, frames: Sequence[bytes | memoryview]) -> None:
        """Send one multipart message; returns when libzmq no longer needs the frames' memory.

        One message at a time per destination, so that a failed or cancelled one can be taken back, by closing the
        socket, without others in it: the frames' memory is free on every exit. Raises DeliveryFailed when the
        destination takes it not in time.
        """
        destination = self._destination(endpoint)
        destination.users += 1
        try:
            async with asyncio.timeout(self._timeout_s), destination.turn:
                await self._send(endpoint, destination, frames)
        except (TimeoutError, zmq.ZMQError):
            raise DeliveryFailed(f"the destination took no embedding within {self._timeout_s:g} s") from None
        finally:
            destination.users -= 1
            destination.used = time.monotonic()
            self._close_idle()

    async def _send(self, endpoint: str, destination: _Destination, frames: Sequence[bytes | memoryview]) -> None:
        if destination.socket.closed:  # whoever had the turn before gave up
            destination.socket = self._connect(endpoint)
        try:
            tracker = await destination.socket.send_multipart(list(frames), copy=False, track=True)
            assert isinstance(tracker, zmq.MessageTracker)
            delay = 0.0001
            while not tracker.done:
                await asyncio.sleep(delay)
                delay = min(delay * 2, 0.005)
        except BaseException:
            destination.socket.close(linger=0)
            raise

    def close(self) -> None:
        """Close every socket, dropping what they hold."""
        for destination in self._destinations.values():
            destination.socket.close(linger=0)
        self._destinations.clear()
        self._context.term()

    def _destination(self, endpoint: str) -> _Destination:
        if endpoint not in self._destinations:
            self._destinations[endpoint] = _Destination(self._connect(endpoint))
        return self._destinations[endpoint]

    def _connect(self, endpoint: str) -> zmq.asyncio.Socket:
        socket = self._context.socket(zmq.PUSH)
        # Only to peers that are there: a message queued for nobody would count as delivered.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        socket.connect(endpoint)
        return socket

    def _close_idle(self) -> None:
        now = time.monotonic()
        for endpoint, destination in list(self._destinations.items()):
            if not destination.users and now - destination.used > IDLE_S:
                destination.socket.close(linger=0)
                del self._destinations[endpoint]
