"""`encode-server serve MODEL --ray MIN-MAX`: the application on a Ray cluster, in one command."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve

from encode_server.cluster.application import Arguments, build
from encode_server.errors import StartupError
from encode_server.settings import load_settings

log = logging.getLogger(__name__)


def serve_on_ray(options: dict[str, Any], replicas: str) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status. The cluster is the one that `RAY_ADDRESS` names or that runs on
    this host; where there is none, one of this host alone is started, and ended afterwards. `options`: see
    `load_settings`; `host` and `port` are the address at which every node takes requests. `replicas`: as given to
    `--ray`.

    Raises StartupError.
    """
    settings = load_settings(options)
    least, most = replica_range(replicas)
    if settings.ssl_certfile is not None:
        raise StartupError("--ssl-certfile: Ray Serve's proxies serve HTTP; put what ends TLS before them")
    of_servers = {name: value for name, value in options.items() if name != "model"}
    try:
        arguments = Arguments.model_validate(
            {"model": settings.model, "options": of_servers, "min_replicas": least, "max_replicas": most}
        )
    except ValidationError as error:
        raise StartupError(str(error)) from None
    application = build(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the start, too, however long that takes
    try:
        ray.init(include_dashboard=False)
    except ConnectionError as error:
        raise StartupError(f"there is no Ray cluster: {error}") from None
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port, "location": "EveryNode"})
        serve.run(application, name="encode-server")
        log.info("serving %s on http://%s:%d of every node", settings.model, settings.host, settings.port)
        threading.Event().wait()
    except KeyboardInterrupt:
        log.info("leaving")
    except RuntimeError as error:
        raise StartupError(f"Ray Serve: {error}") from None
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def replica_range(text: str) -> tuple[int, int]:
    """`2` → (2, 2), `1-4` → (1, 4). Raises StartupError."""
    least, _, most = text.partition("-")
    try:
        return int(least), int(most or least)
    except ValueError:
        raise StartupError(f"--ray {text}: expected a number of replicas, or two, as in 1-4") from None
