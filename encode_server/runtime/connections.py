"""What one connection may cost before anybody knows who is behind the connection: bytes, headers, time, places.

uvicorn's protocol has no such bounds: the parser collects a head of any size, and pipelined requests without end.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from encode_server.wire.answers import ErrorAnswer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds of one listener's connections.

    `connections`: open concurrently, TLS handshakes among them; beyond it, the connection that was idle longest makes
    room for a new one.
    `head_bytes`: request line and headers of one request, and whatever else carries no body: trailers, chunk sizes.
    `headers`: header lines of one request. `head_s`: seconds from the first byte of a request, or from the start of a
    connection, until the headers are complete; a TLS handshake has as long. `pipelined`: requests that wait for the
    answer to one before them. `unread_s`: seconds in which a client must take what was written to the connection.
    """

    connections: int = 4096
    head_bytes: int = 64 << 10
    headers: int = 128
    head_s: float = 10.0
    pipelined: int = 8
    unread_s: float = 30.0


class _Refused(Exception):
    """Ends the parsing of what a connection sends."""


class Sparable(Protocol):
    """A connection that can be closed without harm to a request. `host`: the client's address."""

    host: str

    def abort(self) -> None:
        """Close the connection immediately."""


class IdleConnections:
    """Connections without a request in progress, by the client's address, the one that became idle first in front."""

    def __init__(self) -> None:
        self._by_client: dict[str, dict[Sparable, None]] = {}

    def make_room(self) -> bool:
        """Close the connection that can best be spared; False where none can."""
        if (spare := self.first()) is None:
            return False
        log.debug("closing an idle connection of %s: too many are open", spare.host)
        self.discard(spare)  # now: asyncio tells of the end only later, and the next newcomer needs another
        spare.abort()
        return True

    def add(self, connection: Sparable) -> None:
        """Note that the connection has no request in progress now."""
        self._by_client.setdefault(connection.host, {})[connection] = None

    def discard(self, connection: Sparable) -> None:
        """Note that the connection has a request in progress, or is closed."""
        mine = self._by_client.get(connection.host, {})
        mine.pop(connection, None)
        if not mine:
            self._by_client.pop(connection.host, None)

    def first(self) -> Sparable | None:
        """The connection that can best be spared: the oldest of the client that keeps most of them."""
        most = max(self._by_client.values(), key=len, default=None)
        return next(iter(most)) if most else None


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol within `limits`. Refuses by 408 or 431 where the client can still read an answer, and closes
    the connection in each case."""

    limits = ConnectionLimits()
    idle: IdleConnections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host = ""
        self._plain = 0  # bytes received since the last of a body, or since a request began
        self._named = 0  # bytes of the headers that the parser has handed over
        self._refusal: tuple[int, str] | None = None
        self._running: RequestResponseCycle | None = None  # the request that is being answered; `cycle` is the newest
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    # The connection.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self.host = self.client[0] if self.client else ""
        if len(self.connections) > self.limits.connections and not self.idle.make_room():
            self._refuse(503, "too many connections are open")
            return
        self.idle.add(self)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self.idle.discard(self)
        self._cancel_timers()
        if self._running is not None and not self._running.response_complete:
            # uvicorn tells the newest request alone: the answer to this one would be written to a closed transport.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close the connection immediately; nobody waits for an answer on it."""
        self.transport.abort()

    # What comes in.

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._refusal is not None or self.transport.is_closing():
            return
        self._plain += len(data)
        super().data_received(data)
        if self._refusal is not None:
            return
        if self._plain > self.limits.head_bytes:
            self._refuse(431, f"the headers are larger than {self.limits.head_bytes} bytes")
        elif self._idle and self._head_timer is None:
            self._expect_head()  # or the rest of a body whose request has been answered already

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser could not take, or what a callback below has refused."""
        status, message = self._refusal or (400, "the request is not valid HTTP")
        self._refuse(status, message)

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        self._named = 0

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools. Trailers come here as well."""
        super().on_header(name, value)
        self._count(len(name) + len(value))
        if len(self.headers) > self.limits.headers:
            self._stop(431, f"there are more than {self.limits.headers} headers")

    def on_headers_complete(self) -> None:
        """See httptools."""
        if len(self.pipeline) >= self.limits.pipelined:
            self._stop(431, f"more than {self.limits.pipelined} requests are pipelined")
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._plain = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._plain = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        self._plain = 0
        super().on_message_complete()

    # What goes out.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.idle.discard(self)
        self._watch_unread(False)
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """A request has been answered."""
        super().on_response_complete()
        if self.transport.is_closing() or not self.pipeline:
            self._watch_unread(self.transport.get_write_buffer_size() > 0)
        if not self.transport.is_closing() and self._idle:
            self.idle.add(self)

    def pause_writing(self) -> None:
        """See asyncio."""
        super().pause_writing()
        self._watch_unread(True)

    def resume_writing(self) -> None:
        """See asyncio."""
        super().resume_writing()
        self._watch_unread(self._idle and self.transport.get_write_buffer_size() > 0)

    # Limits.

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _count(self, nbytes: int) -> None:
        self._named += nbytes
        if self._named > self.limits.head_bytes:
            self._stop(431, f"the headers are larger than {self.limits.head_bytes} bytes")

    def _stop(self, status: int, message: str) -> None:
        self._refusal = (status, message)
        raise _Refused

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.head_s, self._on_late_head)

    def _on_late_head(self) -> None:
        self._head_timer = None
        if self._plain:
            self._refuse(408, f"the headers did not arrive within {self.limits.head_s:g} s")
        else:
            self.transport.close()

    def _watch_unread(self, wanted: bool) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
        if wanted:
            self._unread_timer = self.loop.call_later(self.limits.unread_s, self.transport.abort)

    def _cancel_timers(self) -> None:
        self._watch_unread(False)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, message: str) -> None:
        """Answer and close; close only, where an answer would end up within another one."""
        self._refusal = (status, message)
        self._cancel_timers()
        if not self._idle and (self.cycle.response_started or self.pipeline):
            self.transport.abort()
            return
        body = msgspec.json.encode(ErrorAnswer(code=CODES.get(status, "bad_request"), message=message))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
        self._watch_unread(True)


CODES = {408: "too_slow", 431: "headers_too_large", 503: "too_many_connections"}


def guarded(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """The protocol class of one listener, for `uvicorn.Config(http=…)`."""
    return type("GuardedProtocol", (GuardedProtocol,), {"limits": limits, "idle": IdleConnections()})


class DefaultProtocol(GuardedProtocol):
    """For uvicorn's own command: `--http encode_server.runtime.connections:DefaultProtocol`. One listener a process."""

    idle = IdleConnections()
