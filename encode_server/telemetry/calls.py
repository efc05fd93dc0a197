"""Spans of what this server asks of other servers on behalf of a caller: of kind client, below the caller's request."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from encode_server.client.passed_on import Call
from encode_server.telemetry.tracing import Tracing


class TracedCall(Call):
    """A call with a span, whose id is passed on in place of the caller's."""

    def __init__(self, span: Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.headers = {
            "traceparent": f"00-{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}"
            f"-{context.trace_flags:02x}"
        }

    def answered(self, status: int) -> None:
        """See Call."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= 400:
            self._failed(str(status))

    def end(self, error: BaseException | None = None) -> None:
        """See Call."""
        if not self._span.is_recording():
            return
        if isinstance(error, asyncio.CancelledError | GeneratorExit):  # nobody waits for the answer any more
            self._span.set_attribute("error.type", "cancelled")
        elif error is not None:
            self._failed(type(error).__name__)
        self._span.end()

    def _failed(self, why: str) -> None:
        self._span.set_attribute("error.type", why)
        self._span.set_status(Status(StatusCode.ERROR))


def traced_call(tracing: Tracing, method: str, url: str) -> Call:
    """A call on behalf of the request that is being served. Outside of requests, and for probes, nothing is traced."""
    if not trace.get_current_span().get_span_context().is_valid:
        return Call()
    parts = urlsplit(url)
    attributes: dict[str, str | int] = {
        "http.request.method": method,
        "url.full": f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}",  # neither credentials nor query
        "server.address": parts.hostname or "",
        "server.port": parts.port or (443 if parts.scheme == "https" else 80),
    }
    return TracedCall(tracing.tracer.start_span(f"{method} {parts.path}", kind=SpanKind.CLIENT, attributes=attributes))
