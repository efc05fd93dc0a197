"""Run the server under our own uvicorn: bind first, say what goes wrong in one line, exit with a meaningful status."""

from __future__ import annotations

import logging
from collections.abc import Callable

import uvloop

from encode_server import __version__
from encode_server.app import create_app
from encode_server.errors import StartupError
from encode_server.memory import warning
from encode_server.runtime.connections import ConnectionLimits
from encode_server.runtime.forkserver import Launched
from encode_server.runtime.listening import Uvicorn, bind, config, room_for_connections, until_signalled
from encode_server.runtime.resolving import bound_look_ups
from encode_server.runtime.tls import check_tls
from encode_server.settings import Settings, unknown_variables
from encode_server.telemetry import logs

log = logging.getLogger(__name__)

# A connection whose client takes nothing is closed so much later than the request's own limit ends the request: the
# request's log line says why.
LOGGED_FIRST_S = 1.0
VERSION_HEADER = "X-Encode-Server-Version"  # of every answer; docs/stability.md says what the number promises


def serve(settings: Settings, launched: Launched, on_listening: Callable[[str], None] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status. `launched`: the forkserver, which imports meanwhile.
    `on_listening` is given the base URL, before anything is loaded.

    Raises StartupError when it cannot start as asked, or cannot go on.
    """
    logs.configure(settings.log_level, settings.log_format)
    for sentence in unknown_variables():
        log.warning(sentence)
    bound_look_ups()
    failures: list[str] = []
    server: Uvicorn

    def fail(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    if (too_much := warning(settings)) is not None:
        log.warning("%s", too_much)
    check_tls(settings.ssl_certfile, settings.ssl_keyfile)
    connections = room_for_connections(settings.max_connections)
    with bind(settings.host, settings.port) as listener:
        app = create_app(settings, fail, launched)
        server = Uvicorn(
            config(
                app,
                ConnectionLimits(connections=connections, unread_s=settings.send_timeout_s + LOGGED_FIRST_S),
                grace_s=settings.grace_s,
                headers=[(VERSION_HEADER, __version__)],
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
            )
        )
        host, port = listener.getsockname()[:2]
        app.state.server.port = port
        scheme = "https" if settings.ssl_certfile else "http"
        log.info("serving %s on %s://%s:%d, loading", settings.model, scheme, host, port)
        if on_listening is not None:
            on_listening(f"{scheme}://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}")
        uvloop.run(until_signalled(server, listener, app.state.server.drain))
    if failures:
        raise StartupError(failures[0])
    return 0
