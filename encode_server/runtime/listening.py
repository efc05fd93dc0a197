"""A listening socket, and uvicorn on it until a signal says that it is enough."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Any, cast

import uvicorn

from encode_server.errors import StartupError
from encode_server.runtime.connections import ConnectionLimits, GuardedProtocol, guarded
from encode_server.runtime.handshakes import TlsListener

log = logging.getLogger(__name__)

SAME_SIGNAL_S = 0.5  # one Ctrl-C or kill often arrives twice: from the terminal and from the process that started us


RESERVED = 512  # descriptors kept free of connections: for fetches, destinations, files, processes, probes


class Uvicorn(uvicorn.Server):
    """uvicorn's server, with signals, and so the exit status, left to us, and bounds for TLS handshakes."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept connections on `sockets`, which uvicorn would do without bounds
        for handshakes."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(3)
        loop, self.servers = asyncio.get_running_loop(), []
        kind = self.config.http_protocol_class
        assert issubclass(kind, GuardedProtocol)

        def protocol() -> GuardedProtocol:
            return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop)

        for sock in sockets or ():
            if (context := self.config.ssl) is None:
                self.servers.append(await loop.create_server(protocol, sock=sock))
            else:
                listener = TlsListener(sock, context, kind, protocol, self.server_state.connections)
                self.servers.append(cast(asyncio.Server, listener))  # as far as uvicorn asks of one
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def config(app: Any, limits: ConnectionLimits, *, grace_s: float, **more: Any) -> uvicorn.Config:
    """uvicorn's configuration of a listener of ours. `grace_s`: for what is open at the end. `more`: of TLS.

    Headers of proxies are not believed: every client of this host could write them.
    """
    return uvicorn.Config(
        app,
        http=guarded(limits),
        ws="none",
        lifespan="on",
        proxy_headers=False,
        server_header=False,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        **more,
    )


def room_for_connections(most: int) -> int:
    """How many of `most` connections the process has descriptors for, beside those that it needs itself. Raises the
    limit of descriptors as far as it goes: the usual one, 1024, is for programs that use select()."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return most
    return max(1, min(most, hard - min(RESERVED, hard // 2)))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises StartupError when the address is taken or not ours."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartupError(f"cannot listen on {host}:{port}: {reason.lower()}") from None
    listener.setblocking(False)
    return listener


async def until_signalled(
    server: Uvicorn, listener: socket.socket, drain: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C; then `drain`, and end what is open. A second signal waits for neither."""
    first: float | None = None
    leaving: asyncio.Task[None] | None = None

    async def go() -> None:
        try:
            if drain is not None:
                await drain()
        finally:
            server.should_exit = True

    def leave() -> None:
        nonlocal first, leaving
        if first is None:
            first = time.monotonic()
            leaving = asyncio.create_task(go())
        elif time.monotonic() - first > SAME_SIGNAL_S:
            log.warning("a second signal: leaving immediately")
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would show the cancelled lifespan
            server.force_exit = server.should_exit = True

    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, leave)
    await server.serve(sockets=[listener])
