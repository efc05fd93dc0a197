"""The ASGI application: `uvicorn encode_server.app:app`, or `create_app(settings)`."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from encode_server import __version__
from encode_server.api.answers import error_answer
from encode_server.api.encode import EncodeEndpoint
from encode_server.api.openapi import complete
from encode_server.api.routes import build_router
from encode_server.api.shortcut import Shortcut
from encode_server.errors import EncodeError, NoRoute, StartupError
from encode_server.runtime.caller import CALLER_GONE, CallerGone
from encode_server.runtime.ending import Ending
from encode_server.runtime.forkserver import Launched
from encode_server.service.server import Server
from encode_server.settings import Settings, load_settings, unknown_variables
from encode_server.telemetry import logs
from encode_server.telemetry.ids import current_ids
from encode_server.telemetry.request_ids import HEADER, RequestIds
from encode_server.telemetry.tracing import Tracing, fastapi_telemetry, otlp_tracing

log = logging.getLogger(__name__)

WORKERS_REFUSED = (
    "encode-server: it runs in one process (uvicorn --workers and --reload are refused): "
    "each worker would load the model again; for more ranks use ENCODE_SERVER_TP, for more hosts start more servers"
)


def create_app(
    settings: Settings,
    on_fatal: Callable[[str], None] | None = None,
    launched: Launched | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application of one server. `launched`: its forkserver, if it was started before. `tracing`: instead of what
    the settings ask for.

    `on_fatal` is called when it cannot go on; by default the process is ended by SIGTERM, which ends uvicorn with a
    non-zero status. Raises StartupError for settings that cannot work.
    """
    if tracing is None and settings.tracing == "otlp":
        tracing = otlp_tracing(__version__)
    server = Server(settings, launched, tracing)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with server.running(on_fatal or _terminate):
            yield

    telemetry = fastapi_telemetry(tracing)
    app: FastAPI = FastAPIOffline(  # /docs with assets of our own: servers of this kind seldom reach the internet
        title="encode_server",
        version=__version__,
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_parameters={"validatorUrl": None},  # else the page asks a public server to judge the document
        telemetry=telemetry,
    )
    app.include_router(build_router(server))
    if tracing is None:  # spans are named by FastAPI's router
        app.add_middleware(Shortcut, method="POST", path="/encode", endpoint=EncodeEndpoint(server))
    app.add_middleware(Ending)
    app.add_middleware(RequestIds)

    @app.exception_handler(EncodeError)
    async def answer_error(request: Request, error: EncodeError) -> Response:
        return error_answer(error, None)

    @app.exception_handler(CallerGone)
    async def answer_nobody(request: Request, error: CallerGone) -> Response:
        return Response(status_code=CALLER_GONE)

    @app.exception_handler(HTTPException)
    async def answer_no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail.lower()}, /docs shows what there is"
        return error_answer(NoRoute(message, error.status_code, error.headers), None)

    @app.exception_handler(Exception)
    async def answer_unexpected(request: Request, error: Exception) -> Response:
        # The log has the traceback; the caller gets no internals. This answer passes no middleware.
        ids = current_ids()
        headers = {HEADER: ids.request_id} if ids else {}
        return error_answer(EncodeError("an internal error, see the server's log", headers=headers), None)

    plain_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        return complete(plain_openapi(), locked=bool(settings.api_keys))

    app.openapi = openapi  # type: ignore[method-assign]
    app.state.server = server
    return app


def _terminate(reason: str) -> None:
    print(f"encode-server: {reason}", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)


def __getattr__(name: str) -> Any:
    """`app`, built from the environment when uvicorn asks for it, not when somebody imports this module."""
    if name != "app":
        raise AttributeError(name)
    if (supervisor := multiprocessing.parent_process()) is not None:
        # uvicorn would start a dead worker again and again: its supervisor has to end.
        print(WORKERS_REFUSED, file=sys.stderr)
        os.kill(supervisor.pid or os.getppid(), signal.SIGTERM)
        sys.exit(1)
    try:
        settings = load_settings()
        logs.configure(settings.log_level, settings.log_format)
        for sentence in unknown_variables():
            log.warning(sentence)
        return create_app(settings)
    except StartupError as error:
        sys.exit(f"encode-server: {error}")
