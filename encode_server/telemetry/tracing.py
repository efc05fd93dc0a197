"""Spans of OpenTelemetry: one for a request, made by FastAPI, one for each of its stages, one for each batch.

A batch serves several requests. Its span is in the trace of the first, so that a sampler keeps or drops both, and links
to all of them; the `forward` span of each links to the batch. Nothing here reads or adds W3C baggage.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, Status, StatusCode, TracerProvider

from encode_server.errors import StartupError
from encode_server.telemetry.ids import current_ids, enter_request, ids_from_headers

PROBES = frozenset({"/health", "/health_generate", "/livez", "/readyz", "/metrics", "/status", "/list_encoder_urls"})
FLUSH_S = 2.0  # longest wait at the end for a collector that does not answer

Value = str | int | float | bool


class Tracing:
    """Makes the spans of one server. `flush`: sends what has not been sent."""

    def __init__(self, provider: TracerProvider, flush: Callable[[], object] = lambda: None) -> None:
        self.tracer = provider.get_tracer("encode_server")
        self.provider, self._flush = provider, flush

    def stage(
        self,
        name: str,
        seconds: float,
        *,
        ended_s_ago: float = 0.0,
        links: Iterable[SpanContext] = (),
        **attributes: Value,
    ) -> None:
        """A stage of the current request that took so long and ended so long ago."""
        # The span of an answered request has ended: FastAPI ends it with the last byte.
        if not trace.get_current_span().get_span_context().trace_flags.sampled:
            return
        end = time.time_ns() - round(ended_s_ago * 1e9)
        linked = [Link(context) for context in links]
        span = self.tracer.start_span(name, attributes=attributes, links=linked, start_time=end - round(seconds * 1e9))
        span.end(end)

    def start_batch(self, requests: Iterable[SpanContext], **attributes: Value) -> Span | None:
        """The span of a batch that serves these requests, to be ended by `end_batch`; None when none is recorded."""
        contexts = list({context.span_id: context for context in requests}.values())  # items of one request share it
        if not contexts:
            return None
        parent = trace.set_span_in_context(trace.NonRecordingSpan(contexts[0]), Context())
        return self.tracer.start_span("batch", parent, attributes=attributes, links=[Link(c) for c in contexts])

    def close(self) -> None:
        """Send what has not been sent. Blocks for `FLUSH_S` seconds at most, less than the exporter may take."""
        sending = threading.Thread(target=self._flush, daemon=True)
        sending.start()
        sending.join(FLUSH_S)


def end_batch(span: Span | None, error: str = "") -> None:
    """End a batch's span; `error`: why the batch failed."""
    if span is not None:
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end()


def recorded_context() -> SpanContext | None:
    """The current request's span, where somebody records it."""
    span = trace.get_current_span()
    return span.get_span_context() if span.is_recording() else None


def describe_request(**attributes: Value | None) -> None:
    """Say more of the current request, on its span. Nothing happens after the last byte of the answer: FastAPI ends the
    span then."""
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attributes({f"encode.{name}": value for name, value in attributes.items() if value is not None})


def join_trace(traceparent: str | None) -> None:
    """A trace that a body names: the current request's span links to it; without a span, log lines carry its id. One
    that is none counts as absent."""
    ids, named = current_ids(), ids_from_headers(None, traceparent)
    if ids is None or named.trace_id is None or traceparent is None:
        return
    span = trace.get_current_span()
    if span.is_recording():
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if named.sampled else trace.TraceFlags.DEFAULT)
        span.add_link(SpanContext(int(named.trace_id, 16), int(traceparent.split("-")[2], 16), True, flags))
    elif ids.trace_id is None:
        enter_request(replace(ids, trace_id=named.trace_id, sampled=named.sampled))


def fastapi_telemetry(tracing: Tracing | None) -> Any:
    """The argument `telemetry` of FastAPI: spans of requests but for probes, and nothing else."""
    off = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}
    if tracing is None:
        return off
    return off | {"tracing": True, "tracer_provider": tracing.provider, "exclude": _is_probe}


def otlp_tracing(version: str, service: str = "encode-server") -> Tracing:
    """Spans sent by OTLP over HTTP, as OpenTelemetry's variables say (`OTEL_EXPORTER_OTLP_ENDPOINT`,
    `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`, …). `service`: the name where that variable gives none. Raises
    StartupError without OpenTelemetry's SDK."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider as SdkProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise StartupError("--tracing otlp needs OpenTelemetry's SDK: pip install 'encode-server[otel]'") from None
    attributes = {"service.version": version}
    if not os.environ.get("OTEL_SERVICE_NAME"):
        attributes["service.name"] = service
    provider = SdkProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider, provider.force_flush)


def _is_probe(scope: Mapping[str, Any]) -> bool:
    return scope.get("path") in PROBES
