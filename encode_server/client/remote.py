"""Reads embeddings out of encode servers' memory, by NIXL."""

from __future__ import annotations

import secrets
import time
import zlib
from collections import OrderedDict
from typing import Any

from encode_server.client.errors import ProtocolError
from encode_server.wire.frames import RemoteMemory
from encode_server.wire.remote import agent_types

MAX_SERVERS = 64  # that stay connected
POLL_S = 0.0002


class RemoteReader:
    """One agent. Used by one thread at a time. Raises ImportError without NIXL.

    Whoever sends a header makes the agent connect where the header says: take headers from a network of trusted hosts.
    """

    def __init__(self, timeout_s: float = 30.0) -> None:
        make, config = agent_types()
        self._agent: Any = make(f"encode-client-{secrets.token_hex(8)}", config(backends=["UCX"]))
        self._servers: OrderedDict[str, str] = OrderedDict()  # the one used last is the last
        self._timeout_s = timeout_s

    def read(self, memory: RemoteMemory, nbytes: int) -> memoryview:
        """The bytes there; tells the server that they have been read. Blocks. Raises ProtocolError when they cannot be
        read, or not in time."""
        import numpy as np

        room = np.empty(nbytes, np.uint8)
        if not nbytes:
            return room.data
        registered = handle = None
        try:
            server = self._server(memory)
            registered = self._agent.register_memory([(room.ctypes.data, nbytes, 0, "")], "DRAM")
            near = self._agent.get_xfer_descs([(room.ctypes.data, nbytes, 0)], "DRAM")
            far = self._agent.get_xfer_descs([(memory.address, nbytes, 0)], "DRAM")
            handle = self._agent.initialize_xfer("READ", near, far, server, memory.tag)
            state, deadline = self._agent.transfer(handle), time.monotonic() + self._timeout_s
            while state == "PROC" and time.monotonic() < deadline:
                time.sleep(POLL_S)
                state = self._agent.check_xfer_state(handle)
            if state != "DONE":
                raise ProtocolError(f"{nbytes} bytes were not read from {memory.name}: {state}")
        except ProtocolError:
            self._forget(memory.name)
            raise
        except Exception as error:  # NIXL's own errors have no common base
            self._forget(memory.name)
            raise ProtocolError(f"nothing can be read from {memory.name}: {type(error).__name__}: {error}") from None
        finally:
            if handle is not None:
                self._agent.release_xfer_handle(handle)
            if registered is not None:
                self._agent.deregister_memory(registered)
        if zlib.crc32(room.data) != memory.crc:
            raise ProtocolError(f"{memory.name} holds other bytes there by now")
        return room.data

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
