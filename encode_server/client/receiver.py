"""`EmbeddingReceiver`: takes the embeddings that encode servers push."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio

from encode_server.client.assembly import Assembly, Part, read_part
from encode_server.client.early import EarlyParts
from encode_server.client.embedding import Embedding
from encode_server.client.errors import ProtocolError, ReceiverClosed
from encode_server.client.remote import RemoteReader
from encode_server.wire.remote import agent_types

MAX_READS = 256  # embeddings that wait to be read by NIXL

logger = logging.getLogger(__name__)


class EmbeddingReceiver:
    """A ZMQ PULL socket that many encode servers push parts to; an async context manager.

    `nixl`: read embeddings out of servers' memory where they offer that (`EncodeClient.push(transport="nixl")`);
    anybody who can push here makes this process connect to an address of their choice. Raises `ImportError` without it.
    `bind`: the address to listen on; port 0 takes a free one. `max_part_bytes`: a larger frame closes the connection it
    came on. `max_early_bytes`, `max_early_age`: bounds, in bytes and seconds, of what is kept for requests that nobody
    waits for (yet). Raises `ValueError` for an address that isn't `tcp://`.

    Anybody who reaches the address can send; what isn't a well-formed part is counted in `rejected`, logged and
    dropped, a part that is already here is counted in `duplicates`.
    """

    def __init__(
        self,
        bind: str = "tcp://127.0.0.1:0",
        *,
        max_part_bytes: int = 2 << 30,
        max_early_bytes: int = 1 << 30,
        max_early_age: float = 60.0,
        nixl: bool = False,
    ) -> None:
        if not bind.startswith("tcp://"):
            raise ValueError(f"bind is tcp://ADDRESS:PORT, not {bind!r}")
        self.bind = bind
        self.max_part_bytes = max_part_bytes
        self.rejected = 0
        self.duplicates = 0
        if nixl:
            agent_types()  # raises ImportError
        self._nixl = nixl
        self._reader: RemoteReader | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._early = EarlyParts(max_early_bytes, max_early_age)
        self._waiting: dict[str, Assembly] = {}
        self._context: zmq.asyncio.Context | None = None
        self._pump: asyncio.Task[None] | None = None
        self._address = ("", 0)

    @property
    def host(self) -> str:
        """The address that `bind` named; a server elsewhere needs this machine's own where that was a wildcard."""
        return self._address[0]

    @property
    def port(self) -> int:
        """The bound TCP port; 0 before the receiver is entered."""
        return self._address[1]

    async def __aenter__(self) -> Self:
        """Binds. Raises `OSError` when the address can't be had."""
        if self._pump is not None:
            raise RuntimeError("this receiver is open already")
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.PULL)
        try:
            socket.linger = 0
            socket.maxmsgsize = self.max_part_bytes
            socket.ipv6 = "[" in self.bind
            socket.bind(self.bind)
            host, _, port = socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://").rpartition(":")
            if self._nixl:
                self._reader, self._thread = RemoteReader(), ThreadPoolExecutor(1, "nixl")
        except zmq.ZMQError as exc:
            context.destroy(linger=0)
            raise OSError(exc.errno, f"cannot listen on {self.bind}: {exc.strerror}") from exc
        except BaseException:  # NIXL's own errors have no common base
            context.destroy(linger=0)
            raise
        self._address = host.strip("[]"), int(port)
        self._context = context
        self._pump = asyncio.create_task(self._receive_all(socket), name="embedding-receiver")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the socket and ends reads by NIXL; whoever still waits gets `ReceiverClosed`. A second call does
        nothing, and the receiver may be entered again."""
        if self._pump is None or self._context is None:
            return
        pump, context, self._pump, self._context = self._pump, self._context, None, None
        pump.cancel()
        reader, thread, self._reader, self._thread = self._reader, self._thread, None, None
        try:
            await asyncio.wait([pump])
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            self._early.clear()
            context.destroy(linger=0)
            if reader is not None and thread is not None:
                closing = asyncio.get_running_loop().run_in_executor(None, reader.close)
                thread.shutdown(wait=False, cancel_futures=True)
                await closing

    async def receive(self, req_id: str, *, timeout: float = 120.0) -> Embedding:
        """The embedding of `req_id`, whole: the rows of all its parts in the order of their `part_idx`.

        Parts may have come before this call. Raises `TimeoutError` when they aren't all here within `timeout` seconds,
        `EncodeServerError` when a part failed, `ProtocolError` when the parts don't belong together, `ReceiverClosed`.
        Whatever the exit, cancellation included, nothing that had come is kept.
        """
        if self._pump is None or self._pump.done():
            raise ReceiverClosed("the receiver is not open")
        if req_id in self._waiting:
            raise ValueError(f"somebody waits for {req_id!r} already")
        assembly = self._waiting[req_id] = self._early.take(req_id) or Assembly(req_id)
        try:
            async with asyncio.timeout(timeout):
                await assembly.settled.wait()
        except TimeoutError as exc:
            came = f"{len(assembly.parts)} of {assembly.num_parts} parts" if assembly.parts else "nothing"
            raise TimeoutError(f"{came} came for {req_id!r} within {timeout:g} s") from exc
        finally:
            del self._waiting[req_id]
        return await assembly.embedding()

    def forget(self, req_id: str) -> None:
        """Drops what has come for `req_id` and, for the next `max_early_age` seconds, what still comes."""
        self._early.refuse(req_id)

    async def _receive_all(self, socket: zmq.asyncio.Socket) -> None:
        try:
            while True:
                frames = await socket.recv_multipart(copy=False)
                self._take(frames)
                del frames
                # A message that is already here is returned without a pause; a flood must not starve the loop.
                await asyncio.sleep(0)
        finally:
            for assembly in self._waiting.values():
                assembly.fail(ReceiverClosed(f"the receiver was closed before {assembly.req_id!r} was complete"))

    def _take(self, frames: list[zmq.Frame]) -> None:
        try:
            part = read_part(frames, remote=self._reader is not None)
            if part.header.memory is not None:
                self._read_remote(part)
                return
            added = (self._waiting.get(part.header.req_id) or self._early).add(part)
        except ProtocolError as exc:
            self._reject(exc)
            return
        if not added:
            self.duplicates += 1
            logger.info("part %d of %r came twice", part.header.part_idx, part.header.req_id)

    def _reject(self, why: ProtocolError) -> None:
        self.rejected += 1
        if self.rejected.bit_count() == 1:  # The 1st, 2nd, 4th, 8th …: a stranger can't fill the log.
            logger.warning("dropped a message, the %dth of its kind: %s", self.rejected, why)

    def _read_remote(self, part: Part) -> None:
        """Reads the bytes in a thread, one part after another."""
        if part.cost > self.max_part_bytes:
            raise ProtocolError(f"an embedding of {part.cost} bytes")
        if len(self._tasks) >= MAX_READS:
            raise ProtocolError(f"{MAX_READS} embeddings wait to be read already")
        assert self._reader is not None and self._thread is not None
        task = asyncio.create_task(self._read_and_add(part, self._reader, self._thread))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read_and_add(self, part: Part, reader: RemoteReader, thread: ThreadPoolExecutor) -> None:
        header = part.header
        assert header.memory is not None
        try:
            data = await asyncio.get_running_loop().run_in_executor(thread, reader.read, header.memory, part.nbytes)
            whole = replace(part, data=data)
            added = (self._waiting.get(header.req_id) or self._early).add(whole)
        except ProtocolError as exc:
            self._reject(exc)
            return
        if not added:
            self.duplicates += 1
