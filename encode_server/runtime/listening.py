"""A listening socket, and uvicorn on it until a signal says that it is enough."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Generator

import uvicorn

from encode_server.errors import StartupError

log = logging.getLogger(__name__)

SAME_SIGNAL_S = 0.5  # one Ctrl-C or kill often arrives twice: from the terminal and from the process that started us


class Uvicorn(uvicorn.Server):
    """uvicorn's server, with signals, and so the exit status, left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


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
        if drain is not None:
            await drain()
        server.should_exit = True

    def leave() -> None:
        nonlocal first, leaving
        if first is None:
            first = time.monotonic()
            leaving = asyncio.create_task(go())
        elif time.monotonic() - first > SAME_SIGNAL_S:
            log.warning("a second signal: leaving at once")
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would show the cancelled lifespan
            server.force_exit = server.should_exit = True

    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, leave)
    await server.serve(sockets=[listener])
