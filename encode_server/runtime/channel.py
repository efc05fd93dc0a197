"""The child's end of its link to the front, see `link.py`."""

from __future__ import annotations

import os
import queue

import zmq


class Channel:
    """A PAIR socket, and a queue through which other threads have the thread that owns the socket send messages."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: str) -> None:
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 1000
        self._socket.connect(f"ipc://{path}")
        self._posted: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._wake = os.eventfd(0)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    def send(self, message: bytes) -> None:
        """Send from the thread that calls `receive`."""
        self._socket.send(message)

    def post(self, message: bytes) -> None:
        """Have `receive` send `message`: for other threads, which must not touch the socket."""
        self._posted.put(message)
        os.eventfd_write(self._wake, 1)

    def receive(self) -> list[bytes]:
        """Wait for the next message, and send what is posted meanwhile."""
        while True:
            ready = dict(self._poller.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
                while not self._posted.empty():
                    self.send(self._posted.get())
            if self._socket in ready:
                return self._socket.recv_multipart()

    def close(self) -> None:
        """Send what was sent and posted, then close the socket."""
        while not self._posted.empty():
            self.send(self._posted.get())
        os.close(self._wake)
        self._socket.close()
