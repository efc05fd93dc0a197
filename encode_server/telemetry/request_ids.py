"""`X-Request-ID`: taken from the caller or made, in every log line on the request's way, returned on every answer."""

from __future__ import annotations

from dataclasses import replace

from opentelemetry.trace import format_trace_id, get_current_span
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from encode_server.telemetry.ids import enter_request, ids_from_headers

HEADER = "X-Request-ID"


class RequestIds:
    """An ASGI middleware. The ids outlive its call: what answers a failed application still finds them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        ids = ids_from_headers(headers.get(HEADER), headers.get("traceparent"))
        if (span := get_current_span().get_span_context()).is_valid:  # ours, below the caller's if there is one
            ids = replace(ids, trace_id=format_trace_id(span.trace_id), sampled=span.trace_flags.sampled)
        enter_request(ids)
        line = (HEADER.lower().encode(), ids.request_id.encode())

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), line]
            await send(message)

        await self._app(scope, receive, send_named)
