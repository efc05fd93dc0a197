"""Connections to media servers that are read no faster than their bytes are taken.

httpcore's own network goes on reading while a busy loop does not come to the task that would take the bytes: 3 MB were
seen to wait on each of 128 connections, charged to nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore

BUFFER_BYTES = 64 << 10  # reading stops when twice as much waits, and one more read has ended


class MediaStream(httpcore.AsyncNetworkStream):
    """A connection, over asyncio's streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """See httpcore."""
        with _errors(httpcore.ReadTimeout, httpcore.ReadError):
            async with asyncio.timeout(timeout):
                return await self._reader.read(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """See httpcore."""
        with _errors(httpcore.WriteTimeout, httpcore.WriteError):
            async with asyncio.timeout(timeout):
                self._writer.write(buffer)
                await self._writer.drain()

    async def aclose(self) -> None:
        """See httpcore. Bytes that wait are dropped."""
        self._writer.transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore."""
        with _errors(httpcore.ConnectTimeout, httpcore.ConnectError):
            async with asyncio.timeout(timeout):
                await self._writer.start_tls(ssl_context, server_hostname=server_hostname)
        return self

    def get_extra_info(self, info: str) -> Any:
        """See httpcore, which asks an idle connection whether it is readable, that is, closed by the other side."""
        if info == "is_readable":
            return self._reader.at_eof() or self._writer.is_closing() or bool(self._reader._buffer)  # type: ignore[attr-defined]
        return self._writer.get_extra_info({"server_addr": "peername", "client_addr": "sockname"}.get(info, info))


class MediaNetwork(httpcore.AsyncNetworkBackend):
    """Opens connections."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore."""
        local = (local_address, 0) if local_address else None
        with _errors(httpcore.ConnectTimeout, httpcore.ConnectError):
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_connection(host, port, limit=BUFFER_BYTES, local_addr=local)
        found: socket.socket = writer.get_extra_info("socket")
        for option in socket_options or ():
            found.setsockopt(*option)  # type: ignore[arg-type]
        return MediaStream(reader, writer)


@contextlib.contextmanager
def _errors(late: type[Exception], failed: type[Exception]) -> Any:
    try:
        yield
    except TimeoutError as error:
        raise late from error
    except (OSError, EOFError) as error:
        raise failed from error
