"""Run the proxy until it is told to stop."""

from __future__ import annotations

import logging

import uvloop

from encode_server.route.app import create_route_app
from encode_server.route.options import RouteOptions
from encode_server.runtime.connections import ConnectionLimits
from encode_server.runtime.listening import Uvicorn, bind, config, room_for_connections, until_signalled
from encode_server.runtime.resolving import bound_look_ups
from encode_server.telemetry import logs

log = logging.getLogger(__name__)

GRACE_S = 20


def serve_route(options: RouteOptions) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status. Raises StartupError when the address cannot be had."""
    logs.configure("info")
    bound_look_ups()
    with bind(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        log.info(
            "serving %s on http://%s:%d, encoders: %s", options.engine_url, host, port, ", ".join(options.encoder_url)
        )
        limits = ConnectionLimits(connections=room_for_connections(options.max_connections))
        server = Uvicorn(config(create_route_app(options), limits, grace_s=GRACE_S))
        uvloop.run(until_signalled(server, listener))
    return 0
