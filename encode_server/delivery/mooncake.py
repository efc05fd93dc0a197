"""Mooncake's transfer engine: writes an embedding into memory that another process has registered, by RDMA or TCP."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from encode_server.delivery.outgoing import Outgoing, address_of
from encode_server.errors import DeliveryFailed, StartupError
from encode_server.runtime.pools import run_to_end

log = logging.getLogger(__name__)

WRITERS = 4  # transfers in progress; each holds a thread
MAX_WAITING = 1024


class MooncakeEngine:
    """Owner of the engine, its threads and its memory. `room`: memory that the engine knows from the start, None where
    there is none; what lies elsewhere is registered for its transfer."""

    def __init__(
        self,
        host: str,
        protocol: str,
        device: str,
        pool_bytes: int = 0,
        on_full: Callable[[], None] = lambda: None,
    ) -> None:
        """`host`: this machine's address, as peers reach it. `device`: an RDMA device, empty for Mooncake's choice.
        `pool_bytes`: of `room`. `on_full`: called for each embedding that finds no room there.

        Raises StartupError without the package, or when the engine does not start.
        """
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
        self.room: Outgoing | None = None
        if pool_bytes:
            self.room = Outgoing(pool_bytes, on_full)
            if self._engine.register_memory(self.room.address, pool_bytes) != 0:
                raise StartupError(
                    f"--mooncake-pool-mb: {pool_bytes >> 20} MiB cannot be registered with Mooncake's engine; RDMA "
                    "locks them in memory, see `ulimit -l`"
                )
        self._waiting = 0

    async def write(self, session: str, address: int, data: memoryview) -> None:
        """Copy `data` to `address` in the memory of `session` (`host:port`). `data` must not change meanwhile: a
        cancellation waits for the transfer's end. Raises DeliveryFailed."""
        if self._waiting >= MAX_WAITING:
            raise DeliveryFailed(f"{MAX_WAITING} transfers wait already")
        self._waiting += 1
        try:
            with data[:] as view:  # its own: the caller may be cancelled, and release its view, before the thread ends
                failed = await run_to_end(self._pool, self._write, session, address, view)
        finally:
            self._waiting -= 1
        if failed:
            log.warning("Mooncake did not write %d bytes to %s: %d", data.nbytes, session, failed)
            raise DeliveryFailed("the embedding could not be written to its destination's memory")

    def close(self) -> None:
        """Write no more. What is being written goes on; the engine ends with the process."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _write(self, session: str, address: int, data: memoryview) -> int:
        if not data.nbytes:
            return 0
        source = address_of(data)
        known = self.room is not None and self.room.holds(data)
        with contextlib.nullcontext(True) if known else self._memory.hold(source, data.nbytes) as held:
            if not held:
                return -1
            return int(self._engine.transfer_sync_write(session, source, address, data.nbytes))


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
