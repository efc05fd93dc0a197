"""Run the proxy until it is told to stop."""

from __future__ import annotations

import logging

import uvloop

from encode_server.route.app import create_route_app
from encode_server.route.options import RouteOptions
from encode_server.runtime.connections import ConnectionLimits
from encode_server.runtime.listening import Uvicorn, bind, config, room_for_connections, until_signalled
from encode_server.runtime.resolving import bound_look_ups
from encode_server.runtime.tls import check_tls
from encode_server.telemetry import logs

log = logging.getLogger(__name__)


def serve_route(options: RouteOptions) -> int:
    """Serve until SIGTERM or Ctrl-C, then let streams and parts in progress end; the exit status. Raises StartupError
    when the address cannot be had, or for a certificate that cannot be used."""
    logs.configure(options.log_level)
    bound_look_ups()
    check_tls(options.ssl_certfile, options.ssl_keyfile)
    app = create_route_app(options)
    with bind(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        app.state.router.port = port
        scheme = "https" if options.ssl_certfile else "http"
        encoders = ", ".join((*options.encoder_url, *options.encoder_dns)) or "those that register"
        served = options.engine_url or options.protocol
        log.info("serving %s on %s://%s:%d, encoders: %s", served, scheme, host, port, encoders)
        server = Uvicorn(
            config(
                app,
                ConnectionLimits(connections=room_for_connections(options.max_connections)),
                grace_s=options.grace_s,
                ssl_certfile=options.ssl_certfile,
                ssl_keyfile=options.ssl_keyfile,
            )
        )
        uvloop.run(until_signalled(server, listener, app.state.router.drain))
    return 0
