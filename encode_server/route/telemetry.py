"""What the proxy counts, and the log line each request leaves."""

from __future__ import annotations

import logging
import time
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from encode_server.client.encoders import Encoder
from encode_server.client.passed_on import Watcher, pass_on
from encode_server.route.history import RouteHistory
from encode_server.telemetry.calls import traced_call
from encode_server.telemetry.ids import current_ids
from encode_server.telemetry.logs import quoted
from encode_server.telemetry.request_ids import HEADER
from encode_server.telemetry.tracing import PROBES, Tracing

request_log = logging.getLogger("encode_server.requests")

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
PAGE = "/page/"  # its files are not worth a line each
KNOWN = frozenset({"/encode", "/scheduler_receive_url", "/v1/chat/completions", "/register_encoder_url"})
NOTES = "encode_server.notes"
TRACE = ("traceparent", "tracestate", "baggage")


class RouteMetrics:
    """The metrics of one proxy, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "route_requests", "Requests by path and HTTP status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "route_request_seconds",
            "From a request's arrival to the last byte of its answer",
            ["path"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.part_failures = Counter(
            "route_part_failures", "Attempts at an encoder that failed, by reason", ["reason"], registry=self.registry
        )
        self.media = Counter(
            "route_media",
            "Media items by what the engine was given: metadata, media, or left: it encodes them itself",
            ["modality", "form"],
            registry=self.registry,
        )
        self.metadata_refused = Counter(
            "route_metadata_refused",
            "Requests with metadata that the engine answered with this status, and took with media",
            ["status"],
            registry=self.registry,
        )
        self.engine_renames = Gauge(
            "route_engine_renames",
            "1 when the engine gives items of the modality other names: it finds no embedding",
            ["modality"],
            registry=self.registry,
        )
        self.in_progress = Gauge("route_requests_in_progress", "Requests not ended", registry=self.registry)
        self.held_bytes = Gauge("route_held_bytes", "Bytes of parts in progress", registry=self.registry)
        self.encoder_up = Gauge("route_encoder_up", "1 when the encoder is well", ["encoder"], registry=self.registry)
        self.encoder_items = Gauge(
            "route_encoder_items_in_flight", "Items that the encoder was given", ["encoder"], registry=self.registry
        )
        self.encoder_backlog = Gauge(
            "route_encoder_backlog_seconds", "Work that the encoder has", ["encoder"], registry=self.registry
        )

    def render(self, encoders: list[Encoder]) -> bytes:
        """The text format, with the members of now."""
        for gauge in (self.encoder_up, self.encoder_items, self.encoder_backlog):
            gauge.clear()
        for encoder in encoders:
            self.encoder_up.labels(encoder.url).set(encoder.healthy)
            self.encoder_items.labels(encoder.url).set(encoder.in_flight)
            self.encoder_backlog.labels(encoder.url).set(encoder.work.seconds)
        return generate_latest(self.registry)


def _pass_on_trace(scope: Scope, watcher: Watcher | None) -> None:
    """Have the encoders see the caller's trace, with its state and baggage untouched, and the request's id."""
    headers, ids = Headers(scope=scope), current_ids()
    if ids is None:
        return
    trace = {name: headers[name] for name in TRACE if name in headers} if ids.trace_id is not None else {}
    pass_on({HEADER: ids.request_id} | trace, watcher)


class PassesOn:
    """ASGI middleware, to be called below `RequestIds`, which names the request."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None = None) -> None:
        self._app = app
        self._watcher = None if tracing is None else partial(traced_call, tracing)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            _pass_on_trace(scope, self._watcher)
        await self._app(scope, receive, send)


def note(scope: Scope, **fields: object) -> None:
    """Add to the log line of the request."""
    scope.setdefault(NOTES, {}).update(fields)


class Observed:
    """ASGI middleware: counts each request and logs it when the last byte of its answer has gone, or its caller has."""

    def __init__(self, app: ASGIApp, metrics: RouteMetrics, history: RouteHistory) -> None:
        self._app, self._metrics, self._history = app, metrics, history

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, started, status = scope["path"], time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_progress.inc()
        try:
            await self._app(scope, receive, watched)
        finally:
            self._metrics.in_progress.dec()
            seconds = time.perf_counter() - started
            label = path if path in KNOWN or path in PROBES else "other"
            self._metrics.requests.labels(label, str(status)).inc()
            self._metrics.seconds.labels(label).observe(seconds)
            if path not in PROBES and not path.startswith(PAGE):
                self._history.end_request(scope["method"], path, status, seconds)
                notes = "".join(f" {name}={quoted(str(value))}" for name, value in scope.get(NOTES, {}).items())
                request_log.info(
                    "%s %s status=%d total=%.1fms%s", scope["method"], quoted(path[:200]), status, seconds * 1000, notes
                )
