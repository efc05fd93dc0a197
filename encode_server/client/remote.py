"""Reads embeddings out of encode servers' memory, by NIXL."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from encode_server.client.errors import ProtocolError
from encode_server.wire.frames import RemoteMemory
from encode_server.wire.remote import agent_types

logger = logging.getLogger(__name__)

MAX_SERVERS = 64  # that stay connected
MAX_KEPT = 8  # transfers that could be neither ended nor given up; while there are so many, nothing more is read
TIMEOUT_S = 5.0  # of one read; well below the senders' 30 s: embeddings behind one that is lost still come in time
POLL_S = 0.0002


@dataclass
class _Reading:
    """What NIXL holds of one read. `server`: to be forgotten once nothing is held any more, after a failure."""

    room: Any = None  # a NumPy array, uint8 [nbytes]
    registered: Any = None
    handle: Any = None
    server: str | None = None


class RemoteReader:
    """One agent. Reads happen one after another, in whichever threads. Raises ImportError without NIXL.

    Whoever sends a header makes the agent connect where the header says: take headers from a network of trusted hosts.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        make, config = agent_types()
        self._agent: Any = make(f"encode-client-{secrets.token_hex(8)}", config(backends=["UCX"]))
        self._servers: OrderedDict[str, str] = OrderedDict()  # the one used last is the last
        self._timeout_s = timeout_s
        self._kept: list[_Reading] = []  # a transfer in progress may still write into their room
        self._reading, self._closed = threading.Lock(), threading.Event()

    def read(self, memory: RemoteMemory, nbytes: int) -> memoryview:
        """The bytes there; tells the server that they have been read. Blocks. Raises ProtocolError when they cannot be
        read, or not in time, and after `close`."""
        with self._reading:
            if self._closed.is_set():
                raise ProtocolError("the reader is closed")
            return self._read(memory, nbytes)

    def close(self) -> None:
        """End a read in progress, give everything back, and read no more. Blocks for `TIMEOUT_S` at most; when NIXL
        itself hangs for longer, nothing is given back."""
        self._closed.set()
        if not self._reading.acquire(timeout=TIMEOUT_S):
            return
        try:
            self._settle_kept()
            for server in list(self._servers):
                self._forget(server)
            self._agent = None
            # Transfers that hang hold the agent, and end with the agent: their room goes last.
            for reading in self._kept:
                reading.handle = reading.registered = None
            self._kept.clear()
        finally:
            self._reading.release()

    def _read(self, memory: RemoteMemory, nbytes: int) -> memoryview:
        import numpy as np

        self._settle_kept()
        if len(self._kept) >= MAX_KEPT:
            raise ProtocolError(f"{MAX_KEPT} transfers hang")
        reading = _Reading()
        try:
            reading.room = room = np.empty(nbytes, np.uint8)
            if nbytes:
                self._transfer(memory, nbytes, reading)
        except ProtocolError:
            reading.server = memory.name
            raise
        except Exception as error:  # NIXL's own errors have no common base
            reading.server = memory.name
            raise ProtocolError(f"nothing can be read from {memory.name}: {type(error).__name__}: {error}") from None
        finally:
            if (held := self._settle(reading)) is not None:
                logger.warning("%d bytes stay until their transfer has ended: %s", nbytes, held)
                self._kept.append(reading)
        if nbytes and zlib.crc32(room.data) != memory.crc:
            raise ProtocolError(f"{memory.name} holds other bytes there by now")
        data: memoryview = room.data
        return data

    def _transfer(self, memory: RemoteMemory, nbytes: int, reading: _Reading) -> None:
        address = reading.room.ctypes.data
        server = self._server(memory)
        reading.registered = self._agent.register_memory([(address, nbytes, 0, "")], "DRAM")
        near = self._agent.get_xfer_descs([(address, nbytes, 0)], "DRAM")
        far = self._agent.get_xfer_descs([(memory.address, nbytes, 0)], "DRAM")
        reading.handle = self._agent.initialize_xfer("READ", near, far, server, memory.tag)
        state, deadline = self._agent.transfer(reading.handle), time.monotonic() + self._timeout_s
        while state == "PROC" and time.monotonic() < deadline and not self._closed.is_set():
            time.sleep(POLL_S)
            state = self._agent.check_xfer_state(reading.handle)
        if state != "DONE":
            raise ProtocolError(f"{nbytes} bytes were not read from {memory.name}: {state}")

    def _settle(self, reading: _Reading) -> str | None:
        """Give back what NIXL holds; what went wrong, when NIXL still holds some and the room must stay."""
        if reading.handle is not None:
            try:
                self._agent.release_xfer_handle(reading.handle)
            except Exception as error:  # the transfer is in progress and cannot be stopped
                return f"{type(error).__name__}: {error}"
            reading.handle = None
        if reading.registered is not None:
            try:
                self._agent.deregister_memory(reading.registered)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            reading.registered = None
        if reading.server is not None:
            self._forget(reading.server)
        return None

    def _settle_kept(self) -> None:
        self._kept = [reading for reading in self._kept if self._settle(reading) is not None]

    def _server(self, memory: RemoteMemory) -> str:
        name = self._servers.pop(memory.name, None)
        if name is None:
            added = self._agent.add_remote_agent(memory.agent)
            name = added.decode() if isinstance(added, bytes) else str(added)
        self._servers[memory.name] = name
        while len(self._servers) > MAX_SERVERS:
            self._forget(next(iter(self._servers)))
        return name

    def _forget(self, server: str) -> None:
        if (name := self._servers.pop(server, None)) is not None:
            try:
                self._agent.remove_remote_agent(name)
            except Exception:  # it is gone already
                pass
