"""Run the proxy until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Generator

import uvicorn
import uvloop

from encode_server.route.app import create_route_app
from encode_server.route.options import RouteOptions
from encode_server.serve import bind
from encode_server.telemetry import logs

log = logging.getLogger(__name__)

GRACE_S = 20


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, which leaves signals, and so the exit status, to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def serve_route(options: RouteOptions) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status. Raises StartupError when the address cannot be had."""
    logs.configure("info")
    with bind(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        log.info(
            "serving %s on http://%s:%d, encoders: %s", options.engine_url, host, port, ", ".join(options.encoder_url)
        )
        uvloop.run(_until_signalled(options, listener))
    return 0


async def _until_signalled(options: RouteOptions, listener: socket.socket) -> None:
    app = create_route_app(options)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_S)
    server = _Uvicorn(config)

    def leave() -> None:
        server.force_exit = server.should_exit  # the second signal does not wait
        server.should_exit = True

    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, leave)
    await server.serve(sockets=[listener])
