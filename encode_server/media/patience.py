"""A network stream that gives a response's head within a bound of bytes.

The HTTP library reads informational responses (1xx) for as long as they come, without ever giving way to others.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore

from encode_server.runtime.turns import Turns

HEAD_BYTES = 64 << 10  # of a response, its informational responses included
FIRST_PAUSE_S = 0.005  # after a read that gave little; each one after takes twice as long
MAX_PAUSE_S = 0.1
READ_BYTES = 4096  # of a head: what is parsed before others have their turn


class PatientStream(httpcore.AsyncNetworkStream):
    """Wraps `stream`. Between a request and the call of `answered`, no more than `HEAD_BYTES` are read.

    What was read is parsed when it is this stream's turn. A body that trickles in is read again only after a pause: a
    read of one byte costs as much as a read of 64 KiB.
    """

    def __init__(self, stream: httpcore.AsyncNetworkStream, turns: Turns) -> None:
        self._stream, self._turns = stream, turns
        self._pause_s = 0.0
        self._head: int | None = 0  # bytes of the head read; None: the head is complete

    def answered(self) -> None:
        """The head is complete: the body that follows is bounded by who reads it."""
        self._head = None

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """See httpcore. Raises RemoteProtocolError for a head without end."""
        if self._head is None:
            await asyncio.sleep(self._pause_s)
            data = await self._stream.read(max_bytes, timeout)
            if data:
                little = len(data) < READ_BYTES
                self._pause_s = min(MAX_PAUSE_S, self._pause_s * 2 or FIRST_PAUSE_S) if little else 0.0
                await self._turns.wait()
            return data
        if self._head > HEAD_BYTES:
            raise httpcore.RemoteProtocolError("the response's head has no end")
        await self._turns.wait()
        data = await self._stream.read(min(max_bytes, READ_BYTES), timeout)
        self._head += len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """See httpcore. A request: another head follows."""
        self._head, self._pause_s = 0, 0.0
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """See httpcore."""
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore."""
        return PatientStream(await self._stream.start_tls(ssl_context, server_hostname, timeout), self._turns)

    def get_extra_info(self, info: str) -> Any:
        """See httpcore."""
        return self._stream.get_extra_info(info)


class PatientNetwork(httpcore.AsyncNetworkBackend):
    """Wraps the streams of `network`, which take `turns`."""

    def __init__(self, network: httpcore.AsyncNetworkBackend, turns: Turns) -> None:
        self._network, self._turns = network, turns

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore."""
        stream = await self._network.connect_tcp(host, port, timeout, local_address, socket_options)
        return PatientStream(stream, self._turns)
