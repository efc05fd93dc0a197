"""A socket pair between the front and a child process: messages both ways, in order, none dropped.

ZMQ PAIR over ipc. The front's end (`Link`) hangs on the event loop's own file descriptor watch: `zmq.asyncio` costs a
future and several system calls for each message, five times as much. The child's end (`Channel`) is in `channel.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import zmq

from encode_server.runtime.rundir import RunDirectory

Frames = Sequence[bytes | memoryview]

# As plain integers: each `|` and `&` of zmq's flags makes an enumeration's member anew, and a message takes six of
# them.
NOBLOCK, SNDMORE, EVENTS = int(zmq.NOBLOCK), int(zmq.SNDMORE), int(zmq.EVENTS)
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)
LARGE = 256 << 10  # bytes of a frame from which libzmq sends the caller's memory instead of a copy


class Link:
    """The front's end. `on_message` is called on the loop with the frames of each message.

    Owner of the socket and of the private directory that holds the socket's file until the child has connected.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], on_message: Callable[[list[bytes]], None]) -> None:
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._directory: RunDirectory | None = RunDirectory()
        self._drain_due = False
        self._waiting: deque[Frames] = deque()  # for the child to connect
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # messages are few, and none may be dropped
        self.path = str(self._directory.socket)
        self._socket.bind(f"ipc://{self.path}")
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self.drain)

    def send(self, *frames: bytes | memoryview) -> None:
        """Send one message, or queue the message until the child has connected. Large frames are not copied."""
        if self._socket.closed:
            return
        if self._waiting or not self._try_send(frames):
            self._waiting.append(frames)
        # libzmq signals its descriptor once for any number of events, and a send may have taken that signal.
        if not self._drain_due:
            self._drain_due = True
            self._loop.call_soon(self.drain)

    def close(self) -> None:
        """Close the socket; what is not sent is dropped. May be called again."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)
        self._remove_directory()

    def _try_send(self, frames: Frames) -> bool:
        try:
            for frame in frames[:-1]:
                self._send_frame(frame, SNDMORE)
            self._send_frame(frames[-1], 0)
        except zmq.Again:
            return False
        return True

    def _send_frame(self, frame: bytes | memoryview, flags: int) -> None:
        self._socket.send(frame, flags | NOBLOCK, copy=len(frame) < LARGE)

    def drain(self) -> None:
        """Hand over every message that has arrived, and send what waits for the child to connect."""
        self._drain_due = False
        while not self._socket.closed:
            events = int(self._socket.getsockopt(EVENTS))
            if events & POLLIN:
                self._remove_directory()  # the child has connected, so the socket's file has done its work
                self._on_message(self._socket.recv_multipart(NOBLOCK))
            elif self._waiting and events & POLLOUT and self._try_send(self._waiting[0]):
                self._waiting.popleft()
            else:
                return

    def _remove_directory(self) -> None:
        if self._directory is not None:
            self._directory.remove()
            self._directory = None
