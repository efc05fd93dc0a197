"""NIXL: the destination reads an embedding out of this server's memory, by RDMA, shared memory or TCP (UCX chooses)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from encode_server.delivery.outgoing import Outgoing, address_of
from encode_server.errors import DeliveryFailed, StartupError
from encode_server.runtime.pools import Pace, run, run_sized
from encode_server.wire.frames import RemoteMemory
from encode_server.wire.remote import agent_types

log = logging.getLogger(__name__)

POLL_S = 0.001  # between two looks for destinations that have read


class NixlAgent:
    """Owner of the agent, its threads and its memory, which is registered once. Raises StartupError without the
    package."""

    def __init__(self, pool_bytes: int, on_full: Callable[[], None] = lambda: None) -> None:
        """`pool_bytes`: of the memory. `on_full`: called for each embedding that finds no room there."""
        try:
            make, config = agent_types()
        except ImportError as error:
            raise StartupError(f"--nixl-pool-mb needs NIXL: pip install 'encode-server[nixl]' ({error})") from None
        self.name = f"encode-server-{secrets.token_hex(8)}"
        self._agent: Any = make(self.name, config(backends=["UCX"]))
        self.room = Outgoing(pool_bytes, on_full)
        self._agent.register_memory([(self.room.address, pool_bytes, 0, "")], "DRAM")
        self._metadata = bytes(self._agent.get_agent_metadata())
        self._thread = ThreadPoolExecutor(1, "nixl")
        self._checksums = ThreadPoolExecutor(2, "nixl-crc")
        self._taken: dict[bytes, asyncio.Future[None]] = {}
        self._watching: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def offer(self, data: memoryview) -> AsyncIterator[tuple[RemoteMemory, asyncio.Future[None]]]:
        """Where `data`, which lies in `room`, can be read while the context is open, and what ends when it has been.
        Whoever reads later may find another embedding there, and sees that by the checksum."""
        tag = secrets.token_bytes(16)
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            crc = await run_sized(self._checksums, Pace.HASH, data.nbytes, zlib.crc32, data)
            address = address_of(data)
            self._taken[tag] = taken
            if self._watching is None:
                self._watching = asyncio.create_task(self._watch())
            yield RemoteMemory(self.name, self._metadata, address, tag, crc), taken
        finally:
            self._taken.pop(tag, None)

    def close(self) -> None:
        """Offer no more. The memory goes with the process: a destination may still be reading."""
        if self._watching is not None:
            self._watching.cancel()
        for pool in (self._thread, self._checksums):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        """Take in what destinations say, as long as there is one to wait for."""
        try:
            while self._taken:
                for notes in (await run(self._thread, self._agent.get_new_notifs)).values():
                    for tag in notes:
                        if (taken := self._taken.get(bytes(tag))) is not None and not taken.done():
                            taken.set_result(None)
                await asyncio.sleep(POLL_S)
        except Exception as error:
            log.exception("NIXL fails")
            for taken in self._taken.values():
                if not taken.done():
                    taken.set_exception(DeliveryFailed(f"NIXL failed: {type(error).__name__}"))
        finally:
            self._watching = None
