"""`POST /encode` over HTTP: a request's life, its transport HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from encode_server.api import answers
from encode_server.api.body import BodyLimits, read_encode
from encode_server.errors import BadRequest, DeliveryFailed, EncodeError
from encode_server.runtime.bodies import LeastRate, declared_length
from encode_server.runtime.caller import until_caller_goes
from encode_server.runtime.charge import Charge
from encode_server.service.caller import Ask
from encode_server.service.life import serve_encode
from encode_server.service.record import Record, note_end
from encode_server.service.server import Server
from encode_server.telemetry.logs import quoted
from encode_server.wire.embedding import Encoded
from encode_server.wire.headers import ERRORS_HEADER, QUIET, TIMEOUT_HEADER
from encode_server.wire.load import COST_HEADER, load_headers

log = logging.getLogger(__name__)

TIMING_HEADER = "Server-Timing"


class EncodeEndpoint:
    """The ASGI application of `POST /encode`. Raw ASGI, because the answer is a part of the request's life: the request
    holds its place until the last byte of the answer has been taken."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await serve(self._server, HttpCaller, scope, receive, send)


async def serve(server: Server, kind: type[HttpCaller], scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request, whose caller is of `kind`."""
    request = Request(scope, receive)
    try:
        caller = kind(server, request, send)
    except EncodeError as error:
        record = Record(stages={"total": 0.0})
        record.fail(error)
        note_end(server.metrics, server.history, record, error.code)
        await answers.error_answer(error, None)(scope, receive, send)
        return
    await serve_encode(server, caller)


class HttpCaller:
    """See `service.caller.Caller`. Raises Unauthorized, BadRequest."""

    def __init__(self, server: Server, request: Request, send: Send) -> None:
        self._server, self._request, self._send = server, request, send
        self._answering = False
        self.item_tokens: int | None = None
        self.stages: Mapping[str, float] = {}
        self._binary = answers.OCTETS in request.headers.get("accept", "")
        self.client = server.keys.client(request)
        self.asked_timeout_s = _asked_timeout(request)
        self.quiet = request.headers.get(ERRORS_HEADER) == QUIET
        self.declared_bytes = declared_length(request)
        if "transfer-encoding" in request.headers:
            self.declared_bytes = server.settings.max_body_mb << 20  # the body may be that long

    async def read(self, charge: Charge) -> Ask:
        """See `Caller`."""
        settings = self._server.settings
        limits = BodyLimits(settings.max_body_mb << 20, settings.max_items, settings.least_rate_kb << 10)
        return await read_encode(self._request, self._server.pools.work, limits, charge)

    def until_gone(self) -> AbstractAsyncContextManager[None]:
        """See `Caller`."""
        return until_caller_goes(self._request)

    def answer_bytes(self, encoded: Encoded) -> int:
        """See `Caller`."""
        return encoded.nbytes if self._binary else -(-encoded.nbytes // 3) * 4

    async def answer(self, req_id: str, encoded: Encoded, limit_s: float) -> None:
        """See `Caller`."""
        build = answers.safetensors_body if self._binary else answers.json_body
        await self.send(build(req_id, encoded), req_id, limit_s)

    async def send(self, body: answers.Body, req_id: str, limit_s: float) -> None:
        """Send `body`, each piece within `limit_s` seconds. Raises DeliveryFailed."""
        headers = [(b"content-type", body.media_type.encode()), (b"content-length", str(body.size).encode())]
        headers += [(name.lower().encode(), value.encode()) for name, value in self._load_headers().items()]
        self._answering = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        sent, rate = 0, LeastRate(self._server.settings.least_rate_kb << 10)
        for piece in body.pieces:
            sent += len(piece)
            message = {"type": "http.response.body", "body": piece, "more_body": sent < body.size}
            if sent == len(piece) == body.size:  # small: the connection's buffer takes all of it
                await self._send(message)
                return
            try:
                async with asyncio.timeout(limit_s):
                    await rate.wait(self._send(message))
            except TimeoutError:
                took = "too little" if rate.left_s == 0 else "nothing"
                log.warning("request %s: the client took %s of its answer: closing", quoted(req_id), took)
                raise DeliveryFailed(f"the client took {took} of its answer for {limit_s:g} s") from None
            rate.count(len(piece))

    async def confirm(self, req_id: str, encoded: Encoded, *, silent: bool) -> None:
        """See `Caller`."""
        response = answers.nothing() if silent else answers.delivered(req_id, encoded)
        response.headers.update(self._load_headers())
        await response(self._request.scope, self._request.receive, self._send)

    async def refuse(self, error: EncodeError, req_id: str | None) -> None:
        """See `Caller`."""
        if not self._answering:
            response = answers.error_answer(error, req_id)
            response.headers.update(self._load_headers())
            await response(self._request.scope, self._request.receive, self._send)

    def _load_headers(self) -> dict[str, str]:
        headers = load_headers(self._server.load())
        if self.item_tokens is not None:
            headers[COST_HEADER] = str(self.item_tokens)
        if self.stages:
            headers[TIMING_HEADER] = _server_timing(self.stages)
        return headers


def _server_timing(stages: Mapping[str, float]) -> str:
    """The stages that are over, in milliseconds, as the header `Server-Timing` has them; browsers show them."""
    return ", ".join([f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in stages.items()])


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
