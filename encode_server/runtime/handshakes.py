"""A TLS listener whose handshakes count among its connections.

asyncio's own listeners tell a protocol of its connection only after the handshake: connections that never send anything
would take descriptors that no bound knows of.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from encode_server.runtime.connections import GuardedProtocol

log = logging.getLogger(__name__)

PAUSE_S = 0.1  # after an accept that failed, for want of descriptors mostly


@dataclass(eq=False)
class Handshake:
    """A connection whose TLS handshake has not ended. `host`: the client's address."""

    host: str
    task: asyncio.Task[None]

    def abort(self) -> None:
        """Close the connection."""
        self.task.cancel()


class TlsListener:
    """Accepts connections on `listener`, as the servers do that asyncio makes. `close` ends that and the handshakes in
    progress; connections go on."""

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        kind: type[GuardedProtocol],
        protocol: Callable[[], GuardedProtocol],
        connections: Collection[object],
    ) -> None:
        """`protocol` makes a `kind`, which has the connection once its handshake has ended. `connections`: those."""
        self._listener, self._context, self._kind, self._protocol = listener, context, kind, protocol
        self._connections = connections
        self._handshakes: set[Handshake] = set()
        self._task = asyncio.get_running_loop().create_task(self._accept())

    def close(self) -> None:
        """See `asyncio.Server`."""
        self._task.cancel()
        for handshake in self._handshakes:
            handshake.abort()

    async def wait_closed(self) -> None:
        """See `asyncio.Server`."""
        await asyncio.gather(self._task, *(handshake.task for handshake in self._handshakes), return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:
                log.warning("a connection cannot be accepted: %s", error.strerror)
                await asyncio.sleep(PAUSE_S)
                continue
            connection.setblocking(False)
            full = len(self._connections) + len(self._handshakes) >= self._kind.limits.connections
            if full and not self._kind.idle.make_room():
                connection.close()
                continue
            handshake = Handshake(str(address[0]), loop.create_task(self._shake(connection)))
            self._handshakes.add(handshake)
            self._kind.idle.add(handshake)
            handshake.task.add_done_callback(partial(self._end, handshake))

    async def _shake(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol, connection, ssl=self._context, ssl_handshake_timeout=self._kind.limits.head_s
            )
        except OSError as error:  # among them a handshake that takes too long, and whatever is no TLS
            log.debug("a TLS handshake failed: %s", error)
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise

    def _end(self, handshake: Handshake, _: asyncio.Task[None]) -> None:
        self._handshakes.discard(handshake)
        self._kind.idle.discard(handshake)
