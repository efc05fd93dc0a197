"""Run the server under our own uvicorn: bind first, say what goes wrong in one line, exit with a meaningful status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Generator

import uvicorn
import uvloop

from encode_server.app import create_app
from encode_server.errors import StartupError
from encode_server.settings import Settings
from encode_server.telemetry import logs

log = logging.getLogger(__name__)

SAME_SIGNAL_S = 0.5  # one Ctrl-C or kill often arrives twice: from the terminal and from the process that started us


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, with signals left to `serve`, which decides the exit status."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def serve(settings: Settings, on_listening: Callable[[str], None] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status. `on_listening` is given the base URL, before anything is loaded.

    Raises StartupError when it cannot start as asked, or cannot go on.
    """
    logs.configure(settings.log_level)
    failures: list[str] = []
    server: _Uvicorn

    def fail(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    _check_tls(settings)
    # Each connection and fetch takes a descriptor; the usual soft limit of 1024 is for programs that use select().
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with bind(settings.host, settings.port) as listener:
        app = create_app(settings, on_fatal=fail)
        server = _Uvicorn(
            uvicorn.Config(
                app,
                http="httptools",
                log_config=None,
                access_log=False,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
                timeout_graceful_shutdown=max(1, round(settings.grace_s)),
            )
        )
        host, port = listener.getsockname()[:2]
        app.state.server.port = port
        scheme = "https" if settings.ssl_certfile else "http"
        log.info("serving %s on %s://%s:%d, loading", settings.model, scheme, host, port)
        if on_listening is not None:
            on_listening(f"{scheme}://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}")
        uvloop.run(_until_signalled(server, listener, app.state.server.drain))
    if failures:
        raise StartupError(failures[0])
    return 0


def _check_tls(settings: Settings) -> None:
    """Say in one line what uvicorn would say in a traceback."""
    if (settings.ssl_certfile is None) != (settings.ssl_keyfile is None):
        raise StartupError("--ssl-certfile and --ssl-keyfile go together: one is missing")
    if settings.ssl_certfile is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                settings.ssl_certfile, settings.ssl_keyfile
            )
        except (OSError, ssl.SSLError) as error:
            raise StartupError(f"--ssl-certfile, --ssl-keyfile: {error.strerror or error}") from None


async def _until_signalled(
    server: uvicorn.Server, listener: socket.socket, drain: Callable[[], Awaitable[None]]
) -> None:
    first: float | None = None
    leaving: asyncio.Task[None] | None = None

    async def go() -> None:
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
            server.force_exit = True

    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, leave)
    await server.serve(sockets=[listener])


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
