"""Takes pushed embeddings off the network, in a thread of vLLM's scheduler process."""

from __future__ import annotations

import logging
import threading

import zmq

from encode_server.client.assembly import read_part
from encode_server.client.errors import ProtocolError
from encode_server.client.remote import RemoteReader
from encode_server.vllm.shelf import Shelf

logger = logging.getLogger("vllm.encode_server")  # vLLM shows what is logged below its own name


class Inbox:
    """Puts each embedding that arrives at `bind` (`tcp://ADDRESS:PORT`) on the shelf under its `req_id`.

    `nixl`: embeddings may be read out of servers' memory. Raises zmq.ZMQError when the address cannot be had. Anybody
    who reaches the address can send: bind to a network of trusted hosts.
    """

    def __init__(self, bind: str, shelf: Shelf, max_part_bytes: int, *, nixl: bool = False) -> None:
        self._shelf = shelf
        self._reader = RemoteReader() if nixl else None
        self._max_part_bytes = max_part_bytes
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.linger = 0
        self._socket.maxmsgsize = max_part_bytes
        self._socket.ipv6 = "[" in bind
        self._socket.rcvhwm = 16  # what waits in libzmq is not counted by the shelf
        try:
            self._socket.bind(bind)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.received = self.refused = self.malformed = self.failed = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="encode-server-inbox", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take nothing more."""
        self._closing.set()
        if self._reader is not None:
            self._reader.close()
        self._thread.join(5)

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                if self._socket.poll(200):
                    self._take_safely(self._socket.recv_multipart(copy=False))
        except zmq.ZMQError as error:
            logger.error("no more embeddings are received: %s", error)
        finally:
            self._context.destroy(linger=0)

    def _take_safely(self, frames: list[zmq.Frame]) -> None:
        """No message may end the thread: nothing would be received until vLLM is restarted."""
        try:
            self._take(frames)
        except Exception:
            self.failed += 1
            if self.failed.bit_count() == 1:
                logger.exception("a message could not be taken, the %dth of its kind", self.failed)

    def _take(self, frames: list[zmq.Frame]) -> None:
        try:
            part = read_part(frames, remote=self._reader is not None)
            if part.nbytes > self._max_part_bytes:
                raise ProtocolError(f"an embedding of {part.nbytes} bytes")
            if part.header.num_parts != 1:
                raise ProtocolError(f"part {part.header.part_idx} of {part.header.num_parts}, expected a whole item")
        except ProtocolError as error:
            self.malformed += 1
            if self.malformed.bit_count() == 1:  # the 1st, 2nd, 4th, 8th …: a stranger cannot fill the log
                logger.warning("dropped a message, the %dth of its kind: %s", self.malformed, error)
            return
        header = part.header
        if header.error is not None:
            return  # whoever asked for the embedding has the error as well
        data = part.data
        if self._reader is not None and header.memory is not None:
            try:
                data = self._reader.read(header.memory, part.nbytes)
                logger.debug("read %s, %d bytes, from the memory of %s", header.req_id, part.nbytes, header.memory.name)
            except ProtocolError as error:
                logger.warning("an embedding could not be read: %s", error)
                return
        if self._shelf.put(header.req_id, header.dtype, header.shape, data):
            self.received += 1
            return
        self.refused += 1
        if self.refused.bit_count() == 1:
            logger.warning("no room for an embedding, the %dth: vLLM encodes such items itself", self.refused)
