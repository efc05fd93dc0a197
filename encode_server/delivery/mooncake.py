"""Mooncake's transfer engine: writes an embedding into memory that another process has registered, by RDMA or TCP."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from encode_server.errors import DeliveryFailed, StartupError
from encode_server.runtime.pools import run_to_end

log = logging.getLogger(__name__)

WRITERS = 4  # transfers in progress; each holds a thread
MAX_WAITING = 1024


class MooncakeEngine:
    """Owner of the engine and its threads. `host`: this machine's address, as peers reach it. `device`: an RDMA device,
    empty for Mooncake's choice. Raises StartupError without the package, or when the engine does not start."""

    def __init__(self, host: str, protocol: str, device: str) -> None:
        if protocol == "tcp":
            os.environ.setdefault("MC_FORCE_TCP", "1")
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise StartupError(
                f"--mooncake-host needs Mooncake: pip install 'encode-server[mooncake]' ({error})"
            ) from None
        self._engine: Any = TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", protocol, device) != 0:
            raise StartupError(f"--mooncake-host: Mooncake's engine does not start at {host} with {protocol}")
        self.session = f"{host}:{self._engine.get_rpc_port()}"
        self._pool = ThreadPoolExecutor(WRITERS, "mooncake")
        self._memory = _Registered(self._engine)
        self._waiting = 0

    async def write(self, session: str, address: int, data: memoryview) -> None:
        """Copy `data` to `address` in the memory of `session` (`host:port`). `data` must not change meanwhile: a
        cancellation waits for the transfer's end. Raises DeliveryFailed."""
        if self._waiting >= MAX_WAITING:
            raise DeliveryFailed(f"{MAX_WAITING} transfers wait already")
        self._waiting += 1
        try:
            failed = await run_to_end(self._pool, self._write, session, address, data)
        finally:
            self._waiting -= 1
        if failed:
            log.warning("Mooncake did not write %d bytes to %s: %d", data.nbytes, session, failed)
            raise DeliveryFailed("the embedding could not be written to its destination's memory")

    def close(self) -> None:
        """Write no more. What is being written goes on; the engine ends with the process."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _write(self, session: str, address: int, data: memoryview) -> int:
        source = np.frombuffer(data, np.uint8)
        if not source.nbytes:
            return 0
        with self._memory.hold(source.ctypes.data, source.nbytes) as held:
            if not held:
                return -1
            return int(self._engine.transfer_sync_write(session, source.ctypes.data, address, source.nbytes))


class _Registered:
    """Memory that the engine knows: each block registered once, however many transfers read it. Used from any
    thread."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._users: dict[int, int] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def hold(self, address: int, nbytes: int) -> Iterator[bool]:
        """Registered during the block; False where that is not possible."""
        with self._lock:
            held = self._users.get(address, 0) > 0 or self._engine.register_memory(address, nbytes) == 0
            if held:
                self._users[address] = self._users.get(address, 0) + 1
        try:
            yield held
        finally:
            with self._lock:
                if held:
                    self._users[address] -= 1
                    if not self._users[address]:
                        del self._users[address]
                        self._engine.unregister_memory(address)
