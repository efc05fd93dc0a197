"""NIXL: the destination reads an embedding out of this server's memory, by RDMA, shared memory or TCP (UCX chooses)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from encode_server.engine.arena import Arena
from encode_server.errors import DeliveryFailed, EncodeError, StartupError
from encode_server.runtime.pools import run, run_to_end
from encode_server.wire.frames import RemoteMemory
from encode_server.wire.remote import agent_types

log = logging.getLogger(__name__)

POLL_S = 0.001  # between two looks for destinations that have read


class NixlAgent:
    """Owner of the agent, its thread and its memory, which is registered once: registering each embedding would cost
    more than copying it. Raises StartupError without the package."""

    def __init__(self, pool_bytes: int) -> None:
        try:
            make, config = agent_types()
        except ImportError as error:
            raise StartupError(f"--nixl-pool-mb needs NIXL: pip install 'encode-server[nixl]' ({error})") from None
        self.name = f"encode-server-{secrets.token_hex(8)}"
        self._agent: Any = make(self.name, config(backends=["UCX"]))
        self._arena = Arena(pool_bytes)
        self._base = int(np.frombuffer(self._arena.view(0, pool_bytes), np.uint8).ctypes.data)
        self._agent.register_memory([(self._base, pool_bytes, 0, "")], "DRAM")
        self._metadata = bytes(self._agent.get_agent_metadata())
        self._thread = ThreadPoolExecutor(1, "nixl")
        self._copies = ThreadPoolExecutor(2, "nixl-copy")
        self._taken: dict[bytes, asyncio.Future[None]] = {}
        self._watching: asyncio.Task[None] | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes of embeddings that destinations have not read."""
        return self._arena.used

    @property
    def max_bytes(self) -> int:
        """Bytes of the memory; beyond it an embedding waits."""
        return self._arena.size

    @contextlib.asynccontextmanager
    async def offer(self, data: memoryview) -> AsyncIterator[tuple[RemoteMemory, asyncio.Future[None]]]:
        """Where the embedding can be read while the context is open, and what ends when it has been. Waits for room.
        Raises DeliveryFailed where there will never be any."""
        try:
            (slot,) = await self._arena.acquire((data.nbytes,))
        except EncodeError as error:
            raise DeliveryFailed(f"the memory for NIXL is smaller than the embedding: {error.message}") from None
        tag = secrets.token_bytes(16)
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            crc = await run_to_end(self._copies, self._copy, slot.offset, data)
            self._taken[tag] = taken
            if self._watching is None:
                self._watching = asyncio.create_task(self._watch())
            yield RemoteMemory(self.name, self._metadata, self._base + slot.offset, tag, crc), taken
        finally:
            self._taken.pop(tag, None)
            self._arena.release(slot)

    def close(self) -> None:
        """Offer no more. The memory goes with the process: a destination may still be reading."""
        if self._watching is not None:
            self._watching.cancel()
        for pool in (self._thread, self._copies):
            pool.shutdown(wait=False, cancel_futures=True)

    def _copy(self, offset: int, data: memoryview) -> int:
        target = np.frombuffer(self._arena.view(offset, data.nbytes), np.uint8)
        target[:] = np.frombuffer(data, np.uint8)
        return zlib.crc32(data)

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
