"""The proxy's application: chat requests have their media encoded first, all else goes straight to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, ParamSpec, TypeVar

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from encode_server import __version__
from encode_server.client import ClientError, EncoderPool, EncodeServerError
from encode_server.errors import EncodeError
from encode_server.route.chat import media_parts, name_parts, renames
from encode_server.route.engine import Engine, error_response
from encode_server.route.options import RouteOptions
from encode_server.runtime.bodies import from_json, read_all
from encode_server.runtime.caller import CALLER_GONE, CallerGone, until_caller_goes
from encode_server.telemetry.request_ids import RequestIds

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
SMALL_BODY = 64 << 10  # decoded on the loop: less work than a change of threads


class Router:
    """Encoders on one side, the engine on the other."""

    def __init__(self, options: RouteOptions) -> None:
        self._options = options
        self._engine = Engine(options.engine_url)
        self._encoders = EncoderPool(
            options.encoder_url,
            choice=options.choice,
            api_key=options.encoder_api_key,
            timeout=options.timeout_s,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Probe the encoders meanwhile; close the connections after it."""
        try:
            async with self._encoders:
                yield
        finally:
            await self._engine.aclose()

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._answered(request, encode=True)

    async def other(self, request: Request) -> Response:
        """Any other request, unchanged."""
        # It comes decoded, and would be resolved to a path outside /v1/ on its way.
        if {".", ".."} & set(request.scope["path"].split("/")):
            return error_response(400, "the path holds . or ..")
        return await self._answered(request, encode=False)

    async def health(self) -> Response:
        """200 when the engine and at least one encoder are well."""
        encoders = {state.url: state.healthy for state in self._encoders.encoders}
        engine = await self._engine.healthy()
        document = {"engine": engine, "encoders": encoders}
        status = 200 if engine and any(encoders.values()) else 503
        return Response(msgspec.json.encode(document), status, media_type="application/json")

    async def _answered(self, request: Request, encode: bool) -> Response:
        try:
            content = bytes(await read_all(request, self._options.max_body_mb << 20))
            async with until_caller_goes(request):
                if encode:
                    content = await self._encoded(content)
                return await self._engine.forward(
                    request.method, request.url.path, request.url.query, request.headers, content
                )
        except CallerGone:
            return Response(status_code=CALLER_GONE)
        except EncodeError as error:
            return error_response(error.status, error.message, error.headers)
        except EncodeServerError as error:
            wait = {"Retry-After": f"{error.retry_after:g}"} if error.retry_after is not None else {}
            return error_response(error.status, f"media could not be encoded: {error.message}", wait)
        except (ClientError, TimeoutError) as error:
            log.error("media could not be encoded: %s", error)
            late = isinstance(error, TimeoutError)
            return error_response(504 if late else 502, "media could not be encoded: no encoder answered")

    async def _encoded(self, content: bytes) -> bytes:
        """The request with its media named, once their embeddings are where the engine looks for them."""
        body: Any = await _maybe_threaded(len(content), from_json, content, object)
        parts = media_parts(body)
        if not parts:
            return content
        if renames(body):
            log.warning("mm_processor_kwargs or media_io_kwargs given: the engine encodes this request's media itself")
            return content
        named = await _maybe_threaded(len(content), name_parts, parts, self._options.video_fps)
        try:
            async with asyncio.TaskGroup() as group:
                for modality, items in named.items():
                    group.create_task(self._encoders.store(items, modality))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return await _maybe_threaded(len(content), msgspec.json.encode, body)


def create_route_app(options: RouteOptions) -> FastAPI:
    """The application of one proxy."""
    router = Router(options)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with router.running():
            yield

    app = FastAPI(title="encode_server route", version=__version__, lifespan=lifespan)
    app.add_middleware(RequestIds)
    app.add_api_route("/v1/chat/completions", router.chat, methods=["POST"], response_model=None)
    app.add_api_route("/health", router.health, methods=["GET"])
    app.add_api_route("/v1/{path:path}", router.other, methods=METHODS, include_in_schema=False)
    return app


async def _maybe_threaded(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    if size >= SMALL_BODY:
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)
