"""`POST /encode` over HTTP: a request's life, its transport HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import AbstractAsyncContextManager

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from encode_server.api import answers
from encode_server.api.body import declared_length, read_encode
from encode_server.errors import BadRequest, DeliveryFailed, EncodeError
from encode_server.runtime.caller import until_caller_goes
from encode_server.service.caller import Ask
from encode_server.service.life import serve_encode
from encode_server.service.record import Record, note_end
from encode_server.service.server import Server
from encode_server.wire.embedding import Encoded

log = logging.getLogger(__name__)

TIMEOUT_HEADER = "X-Encode-Timeout-S"


class EncodeEndpoint:
    """The ASGI application of `POST /encode`. Raw ASGI, because the answer is a part of the request's life: the request
    holds its place until the last byte of the answer has been taken."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        request = Request(scope, receive)
        try:
            caller = HttpCaller(self._server, request, send)
        except EncodeError as error:
            note_end(self._server.metrics, Record(stages={"total": 0.0}), error.code)
            await answers.error_answer(error, None)(scope, receive, send)
            return
        await serve_encode(self._server, caller)


class HttpCaller:
    """See `service.caller.Caller`. Raises Unauthorized, BadRequest."""

    def __init__(self, server: Server, request: Request, send: Send) -> None:
        self._server, self._request, self._send = server, request, send
        self._answering = False
        self._binary = answers.OCTETS in request.headers.get("accept", "")
        self.client = server.keys.client(request)
        self.asked_timeout_s = _asked_timeout(request)
        self.declared_bytes = declared_length(request)
        if "transfer-encoding" in request.headers:
            self.declared_bytes = server.settings.max_body_mb << 20  # the body may be that long

    async def read(self) -> Ask:
        """See `Caller`."""
        settings = self._server.settings
        return await read_encode(self._request, self._server.pools.work, settings.max_body_mb << 20, settings.max_items)

    def until_gone(self) -> AbstractAsyncContextManager[None]:
        """See `Caller`."""
        return until_caller_goes(self._request)

    def answer_bytes(self, encoded: Encoded) -> int:
        """See `Caller`."""
        return encoded.nbytes if self._binary else -(-encoded.nbytes // 3) * 4

    async def answer(self, req_id: str, encoded: Encoded, limit_s: float) -> None:
        """See `Caller`."""
        build = answers.safetensors_body if self._binary else answers.json_body
        body = build(req_id, encoded)
        headers = [(b"content-type", body.media_type.encode()), (b"content-length", str(body.size).encode())]
        self._answering = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        sent = 0
        for piece in body.pieces:
            sent += len(piece)
            try:
                async with asyncio.timeout(limit_s):
                    await self._send({"type": "http.response.body", "body": piece, "more_body": sent < body.size})
            except TimeoutError:
                log.warning("request %s: the client took nothing of its answer for %g s: closing", req_id, limit_s)
                raise DeliveryFailed(f"the client took nothing of its answer for {limit_s:g} s") from None

    async def confirm(self, req_id: str, encoded: Encoded, *, silent: bool) -> None:
        """See `Caller`."""
        response = answers.nothing() if silent else answers.delivered(req_id, encoded)
        await response(self._request.scope, self._request.receive, self._send)

    async def refuse(self, error: EncodeError, req_id: str | None) -> None:
        """See `Caller`."""
        if not self._answering:
            response = answers.error_answer(error, req_id)
            await response(self._request.scope, self._request.receive, self._send)


def _asked_timeout(request: Request) -> float | None:
    """Seconds from the header, for callers that set deadlines without touching bodies."""
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise BadRequest(f"the header {TIMEOUT_HEADER} is {value!r}, expected seconds above 0")
    return seconds
