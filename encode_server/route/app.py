"""The proxy's application: chat requests have their media encoded first, all else goes straight to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from encode_server import __version__
from encode_server.client import ClientError, EncoderPool, EncodeServerError
from encode_server.delivery.destinations import DestinationPolicy
from encode_server.delivery.sglang.announcer import Announcer, advertised_host
from encode_server.errors import BadRequest, EncodeError, NoRoute
from encode_server.page import page_routes
from encode_server.pipeline.admission import Admission, AdmissionLimits
from encode_server.route.chat import CHAT, LIMITS, MESSAGES, RESPONSES, media_items, media_parts
from encode_server.route.engine import Engine, error_response
from encode_server.route.fleet import Fleet
from encode_server.route.history import RouteHistory
from encode_server.route.options import RouteOptions
from encode_server.route.sglang import SGLangFace
from encode_server.route.status import route_status
from encode_server.route.telemetry import Observed, PassesOn, RouteMetrics
from encode_server.route.vllm import ForEngine, VLLMFace
from encode_server.route.work import Document, concurrently
from encode_server.runtime.arriving import Raw
from encode_server.runtime.bodies import declared_length, read_all
from encode_server.runtime.caller import CALLER_GONE, CallerGone, until_caller_goes
from encode_server.runtime.ending import Ending
from encode_server.runtime.outline import Outline, outline
from encode_server.runtime.pools import Pace, run_sized
from encode_server.service.keys import ApiKeys
from encode_server.telemetry.request_ids import RequestIds
from encode_server.telemetry.tracing import Tracing, fastapi_telemetry, otlp_tracing

log = logging.getLogger(__name__)

MAX_ENCODED = 4  # layers of percent signs
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
LINGER_S = 1.0  # a prefill that has just read the list of encoders still sends a part here


class Router:
    """Encoders on one side, the engine on the other. `port`: the listening port, set by whoever binds the socket."""

    def __init__(self, options: RouteOptions) -> None:
        self._options = options
        self.port = options.port
        self.metrics = RouteMetrics()
        self._pool = ThreadPoolExecutor(4, "work")
        self.history = RouteHistory()
        self._engine = Engine(options.engine_url) if options.engine_url else None
        limits = AdmissionLimits(options.max_requests, options.max_inflight_mb << 20, 1, options.client_share)
        self._admission = Admission(limits)
        self._encoders = EncoderPool(
            options.encoder_url,
            choice=options.choice,
            api_key=options.encoder_api_key,
            timeout=options.encode_timeout_s,
        )
        members = self._encoders.members
        policy = DestinationPolicy(options.register_allow)
        self.fleet = Fleet(members, options.encoder_url, options.encoder_dns, policy)
        self.sglang = None
        if options.protocol == "sglang":
            self.sglang = SGLangFace(
                members,
                self.fleet,
                policy,
                self.metrics,
                timeout_s=options.encode_timeout_s,
                pool=self._pool,
                max_body_bytes=options.max_body_mb << 20,
                max_waiting_bytes=options.max_waiting_mb << 20,
                least_rate=options.least_rate_kb << 10,
            )
        self.vllm = None
        if options.protocol == "vllm" and self._engine is not None:
            self.vllm = VLLMFace(self._encoders, self._engine, self.metrics, options)
        self._keys = ApiKeys(options.api_keys)
        self._announcer = Announcer(
            options.register_url,
            "https" if options.ssl_certfile else "http",
            advertised_host(options.advertise_host, options.host),
            self._any_well,
        )
        self._draining = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Probe and look for encoders meanwhile; close the connections after it."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._pool.shutdown, wait=False, cancel_futures=True)
            if self._engine is not None:
                stack.push_async_callback(self._engine.aclose)
            if self.sglang is not None:
                stack.callback(self.sglang.close)
            await stack.enter_async_context(self._encoders)
            finder = asyncio.create_task(self.fleet.run())
            stack.callback(finder.cancel)
            stack.push_async_callback(self._announcer.aclose)
            self._announcer.start(self._options.advertise_port or self.port)
            yield

    async def drain(self) -> None:
        """Withdraw what brings requests here; those that come all the same are still taken for a moment."""
        self._draining = True
        await self._announcer.withdraw()
        if self.sglang is not None:
            await asyncio.sleep(LINGER_S)

    def _any_well(self) -> bool:
        return any(state.healthy for state in self._encoders.encoders)

    async def chat(self, request: Request) -> Response:
        """A request that may hold media: chat completions, responses, and before SGLang Anthropic's messages. vLLM
        takes no names in messages, and would not find an embedding."""
        return await self._answered(request, encode=True)

    async def other(self, request: Request) -> Response:
        """Any other request, unchanged."""
        return await self._answered(request, encode=False)

    async def health(self) -> Response:
        """200 when the engine and at least one encoder are well. SGLang's bootstrap is told 200 in any case: parts wait
        here for an encoder, while a prefill that knows no encoder fails every chat."""
        document = await self._state()
        well = document["engine"] is not False and any(document["encoders"].values())
        status = 200 if well or self.sglang is not None else 503
        return Response(msgspec.json.encode(document), status, media_type="application/json")

    async def live(self) -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive", "version": __version__}

    async def ready(self) -> Response:
        """200 when requests should come here."""
        document = await self._state()
        reason = None
        if self._draining:
            reason = "the proxy is stopping"
        elif not any(document["encoders"].values()):
            reason = "no encoder is well"
        elif document["engine"] is False:
            reason = "the engine is not well"
        document |= {"status": "not ready" if reason else "ready", "reason": reason}
        return Response(msgspec.json.encode(document), 503 if reason else 200, media_type="application/json")

    async def show_metrics(self) -> Response:
        """Prometheus metrics."""
        if self.sglang is not None:
            self.metrics.held_bytes.set(self.sglang.held.bytes)
        text = self.metrics.render(self._encoders.members.all)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def show_status(self, request: Request) -> Response:
        """What a person on call wants to see, see `route.status.RouteStatus`."""
        try:
            self._keys.client(request)
        except EncodeError as error:
            return error_response(error.status, error.message, error.headers)
        document = route_status(
            self._encoders.members.all,
            self.fleet,
            self.history,
            engine_url=self._options.engine_url,
            engine=None if self._engine is None else await self._engine.healthy(),
            requests_in_progress=self._admission.held.requests,
            draining=self._draining,
        )
        return Response(
            msgspec.json.encode(document), headers={"Cache-Control": "no-store"}, media_type="application/json"
        )

    async def _state(self) -> dict[str, Any]:
        """`engine`: whether it is well, None where there is none."""
        engine = None if self._engine is None else await self._engine.healthy()
        return {"engine": engine, "encoders": {state.url: state.healthy for state in self._encoders.encoders}}

    async def _answered(self, request: Request, encode: bool) -> Response:
        try:
            self._keys.client(request)
            if self._engine is None:
                raise NoRoute("this proxy has no engine: it was started without --engine-url", 404, None)
            target = _target(request)
            client = request.client.host if request.client else ""
            with self._admission.admit(client, declared_length(request)) as ticket:
                # Who the engine does not know must cost neither memory here nor work of the encoders.
                if encode and (refusal := await self._engine.refusal(request.headers)) is not None:
                    return refusal
                options = self._options
                limits = options.max_body_mb << 20, options.least_rate_kb << 10
                raw = (await read_all(request, *limits, ticket.grow, self._pool)).whole()
                async with until_caller_goes(request):
                    ready = ForEngine([memoryview(raw)])
                    if encode:
                        ready = await self._encoded(request.scope["path"], request.headers, raw)
                    del raw  # the pieces of `ready` are given away as the engine takes them
                    if self.vllm is not None:
                        return await self.vllm.forward(request.method, target, request.headers, ready)
                    answer = await self._engine.send(request.method, target, request.headers, ready.content)
                    return self._engine.passed_on(answer)
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

    async def _encoded(self, path: str, headers: Mapping[str, str], raw: Raw) -> ForEngine:
        """The request, once its media are encoded."""
        found: Outline[Any] = await run_sized(self._pool, Pace.JSON, len(raw), outline, raw, object, LIMITS)
        parts = media_parts(found, path)
        if not parts:
            return ForEngine([memoryview(raw)])
        if self.vllm is None:
            items = await run_sized(self._pool, Pace.HASH, len(raw), media_items, parts)
            await concurrently(items, self._encoders.warm)
            return ForEngine([memoryview(raw)])
        return await self.vllm.encoded(path, headers, Document(raw, found, self._pool), parts)


def create_route_app(options: RouteOptions, tracing: Tracing | None = None) -> FastAPI:
    """The application of one proxy. `tracing`: instead of what the options ask for. Raises StartupError."""
    if tracing is None and options.tracing == "otlp":
        tracing = otlp_tracing(__version__, "encode-server-route")
    router = Router(options)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with router.running():
            yield
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    telemetry: Any = fastapi_telemetry(tracing)
    app = FastAPI(title="encode_server route", version=__version__, lifespan=lifespan, telemetry=telemetry)
    app.add_middleware(Ending)
    app.add_middleware(PassesOn, tracing=tracing)
    app.add_middleware(RequestIds)
    for path in (CHAT, RESPONSES, MESSAGES) if router.sglang is not None else (CHAT, RESPONSES):
        app.add_api_route(path, router.chat, methods=["POST"], response_model=None)
    app.add_api_route("/health", router.health, methods=["GET"])
    app.add_api_route("/health_generate", router.health, methods=["GET"], include_in_schema=False)
    app.add_api_route("/livez", router.live, methods=["GET"])
    app.add_api_route("/readyz", router.ready, methods=["GET"])
    app.add_api_route("/metrics", router.show_metrics, methods=["GET"])
    app.add_api_route("/status", router.show_status, methods=["GET"])
    if options.page == "on":
        app.router.routes.extend(page_routes())
    if router.sglang is not None:
        router.sglang.add_routes(app.router)
    app.add_middleware(Observed, metrics=router.metrics, history=router.history)
    app.state.router = router
    app.add_api_route("/v1/{path:path}", router.other, methods=METHODS, include_in_schema=False)
    return app


def _target(request: Request) -> bytes:
    """Path and query as they came. Raises BadRequest for a path that somebody on the way to the engine, or the engine
    itself, may read as another one: with dots, however often they are encoded, with a backslash or a control character.
    """
    raw = request.scope["raw_path"] + (b"?" + query if (query := request.scope["query_string"]) else b"")
    path = request.scope["path"]
    for _ in range(MAX_ENCODED):
        if {".", ".."} & set(path.split("/")) or "\\" in path or not path.isprintable():
            raise BadRequest("the path holds . or .., a backslash or a control character")
        decoded = unquote(path)
        if decoded == path:
            return bytes(raw)
        path = decoded
    raise BadRequest(f"the path is encoded more than {MAX_ENCODED} times")
