"""A network stream that gives a response's head within a bound of bytes.

The HTTP library reads informational responses (1xx) for as long as they come, without ever giving way to others.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore

HEAD_BYTES = 64 << 10  # of a response, its informational responses included
READ_BYTES = 4096  # of a head: what is parsed before others have their turn


class PatientStream(httpcore.AsyncNetworkStream):
    """Wraps `stream`. Between a request and the call of `answered`, no more than `HEAD_BYTES` are read."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._head: int | None = 0  # bytes of the head read; None: the head is complete

    def answered(self) -> None:
        """The head is complete: the body that follows is bounded by who reads it."""
        self._head = None

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """See httpcore. Raises RemoteProtocolError for a head without end."""
        if self._head is None:
            return await self._stream.read(max_bytes, timeout)
        if self._head > HEAD_BYTES:
            raise httpcore.RemoteProtocolError("the response's head has no end")
        await asyncio.sleep(0)
        data = await self._stream.read(min(max_bytes, READ_BYTES), timeout)
        self._head += len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """See httpcore. A request: another head follows."""
        self._head = 0
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """See httpcore."""
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore."""
        return PatientStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """See httpcore."""
        return self._stream.get_extra_info(info)


class PatientNetwork(httpcore.AsyncNetworkBackend):
    """Wraps the streams of `network`."""

    def __init__(self, network: httpcore.AsyncNetworkBackend) -> None:
        self._network = network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore."""
        return PatientStream(await self._network.connect_tcp(host, port, timeout, local_address, socket_options))
