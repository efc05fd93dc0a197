"""The least HTTP client that a load needs: it shares the processors with the server that it measures."""

from __future__ import annotations

import asyncio
import time
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

from encode_server.bench.source import LoadRequest
from encode_server.errors import StartupError

NO_ANSWER = 0
"""The status of a request that got no answer."""

_KEEP_S = 4.0  # below uvicorn's 5 s, so that a connection isn't used again just as the server closes it
_HEAD_BYTES = 1 << 16  # of a body that is not kept: enough for the header of a safetensors file


class _Tensor(msgspec.Struct):
    shape: tuple[int, ...]


class _Header(msgspec.Struct):
    embedding: _Tensor


_header = msgspec.json.Decoder(_Header)


class Response(msgspec.Struct):
    """An answer: its status (`NO_ANSWER` with the reason in `error`), its size, and its body as far as it was kept."""

    status: int
    size: int
    body: bytes
    headers: dict[str, str]
    error: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """[tokens, dim] of the embedding in a safetensors answer, () when there is none."""
        length = int.from_bytes(self.body[:8], "little")
        if self.status != 200 or length > _HEAD_BYTES - 8:
            return ()
        try:
            return _header.decode(self.body[8 : 8 + length]).embedding.shape
        except msgspec.MsgspecError:
            return ()


class Connection(asyncio.Protocol):
    """One keep-alive connection, for one request at a time."""

    def __init__(self, keep_body: bool) -> None:
        self._keep = keep_body
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._reset()

    @property
    def open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def send(self, pieces: list[bytes]) -> Response:
        """Write a whole request and wait for the whole answer. Cancelled, it closes the connection."""
        if self._transport is None:
            return Response(NO_ANSWER, 0, b"", {}, "connection lost: closed by the server")
        self._answer = asyncio.get_running_loop().create_future()
        self._reset()
        self._transport.writelines(pieces)
        try:
            return await self._answer
        except asyncio.CancelledError:
            self._transport.abort()
            raise

    def close(self) -> None:
        """Close it; a request that waits gets no answer."""
        if self._transport is not None:
            self._transport.abort()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: list[bytes] = []
        self._size = 0
        self._headers: dict[str, str] = {}

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(Response(NO_ANSWER, self._size, b"", {}, f"not HTTP: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._finish(Response(NO_ANSWER, self._size, b"", {}, f"connection lost: {exc or 'closed by the server'}"))

    # httptools' side.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        if self._keep or self._size < _HEAD_BYTES:
            self._chunks.append(data)
        self._size += len(data)

    def on_message_complete(self) -> None:
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        response = Response(self._parser.get_status_code(), self._size, body, self._headers)
        if not self._parser.should_keep_alive():
            self.close()
        self._finish(response)

    def _finish(self, response: Response) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(response)


class LoadClient:
    """Sends `LoadRequest`s to one server over connections that it keeps. Nothing a server does raises.

    `keep_body`: whether answers carry the whole body (an embedding to check) or just its first bytes.
    """

    def __init__(
        self, url: str, *, keep_body: bool = False, timeout_s: float = 120.0, api_key: str | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise StartupError(f"{url!r} is not the URL of a server: takes http://host:port")
        self._host, self._port = parts.hostname, parts.port or 80
        self._prefix = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._keep = keep_body
        authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n{authorization}"
        self._idle: list[Connection] = []

    async def send(self, request: LoadRequest) -> tuple[Response, float]:
        """The answer, and the seconds until its last byte."""
        length = sum(map(len, request.pieces))
        head = (
            f"{request.method} {self._prefix}{request.path} HTTP/1.1\r\n{self._headers}"
            f"Accept: {request.accept}\r\nContent-Length: {length}\r\n\r\n"
        )
        pieces = [head.encode(), *request.pieces]
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connection()
                response = await connection.send(pieces)
        except TimeoutError:
            response = Response(NO_ANSWER, 0, b"", {}, "timed out in the client")
        except OSError as error:
            response = Response(NO_ANSWER, 0, b"", {}, f"no connection: {error.strerror or error}")
        else:
            if connection.open:
                connection.idle_since = time.perf_counter()
                self._idle.append(connection)
        return response, time.perf_counter() - started

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open and time.perf_counter() - connection.idle_since < _KEEP_S:
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(self._keep), self._host, self._port)
        return connection
