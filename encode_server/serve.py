"""Run the server under our own uvicorn: bind first, say what goes wrong in one line, exit with a meaningful status."""

from __future__ import annotations

import logging
import resource
import ssl
from collections.abc import Callable

import uvicorn
import uvloop

from encode_server.app import create_app
from encode_server.errors import StartupError
from encode_server.runtime.forkserver import Launched
from encode_server.runtime.listening import Uvicorn, bind, until_signalled
from encode_server.settings import Settings, unknown_variables
from encode_server.telemetry import logs

log = logging.getLogger(__name__)


def serve(settings: Settings, launched: Launched, on_listening: Callable[[str], None] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status. `launched`: the forkserver, which imports meanwhile.
    `on_listening` is given the base URL, before anything is loaded.

    Raises StartupError when it cannot start as asked, or cannot go on.
    """
    logs.configure(settings.log_level, settings.log_format)
    for sentence in unknown_variables():
        log.warning(sentence)
    failures: list[str] = []
    server: Uvicorn

    def fail(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    _check_tls(settings)
    # Each connection and fetch takes a descriptor; the usual soft limit of 1024 is for programs that use select().
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with bind(settings.host, settings.port) as listener:
        app = create_app(settings, fail, launched)
        server = Uvicorn(
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
        uvloop.run(until_signalled(server, listener, app.state.server.drain))
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
