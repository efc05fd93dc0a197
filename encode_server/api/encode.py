"""One `POST /encode`, from its body to its answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid

from starlette.requests import Request
from starlette.responses import Response

from encode_server.api import answers
from encode_server.api.body import declared_length, read_encode
from encode_server.api.schemas import EncodeBody
from encode_server.delivery.base import Delivery, Part
from encode_server.delivery.native import NativePush
from encode_server.delivery.sglang.deliveries import SGLangPush
from encode_server.errors import BadRequest, DeadlineExceeded, EncodeError, Forbidden, NotReady
from encode_server.pipeline.admission import Ticket
from encode_server.pipeline.request import EncodeRequest, MediaItem
from encode_server.runtime.caller import CALLER_GONE, CallerGone, until_caller_goes
from encode_server.runtime.pools import copy
from encode_server.service.server import Server
from encode_server.telemetry.cpu import counted
from encode_server.telemetry.logs import log_request
from encode_server.wire.embedding import Encoded
from encode_server.wire.modality import Modality

log = logging.getLogger(__name__)

TIMEOUT_HEADER = "X-Encode-Timeout-S"


class EncodeCall:
    """Reads the request, has the pipeline encode it, answers or delivers, and leaves one log line."""

    def __init__(self, server: Server, http: Request) -> None:
        self._server, self._http = server, http
        self._req_id: str | None = None
        self._stages: dict[str, float] = {}
        self._modality, self._items, self._tokens = "unknown", 0, 0

    async def answer(self) -> Response:
        """The answer, also to what fails."""
        started = time.perf_counter()
        outcome = "ok"
        try:
            response = await self._admitted()
        except EncodeError as error:
            outcome = error.code
            response = answers.error_answer(error, self._req_id)
        except CallerGone:
            outcome = "gone"
            response = Response(status_code=CALLER_GONE)
        self._server.metrics.requests.labels(self._modality, outcome).inc()
        self._stages["total"] = time.perf_counter() - started
        log_request(self._req_id or "-", self._modality, outcome, self._items, self._tokens, self._stages)
        return response

    async def _admitted(self) -> Response:
        client = self._server.keys.client(self._http)
        if reason := self._server.not_ready():
            raise NotReady(reason, headers={"Retry-After": "2"})
        # Before its body is read: refusing must cost less than taking.
        declared = declared_length(self._http)
        if "transfer-encoding" in self._http.headers:
            declared = self._server.settings.max_body_mb << 20  # it may be that long
        with self._server.admission.admit(client, declared) as ticket:
            return await self._read_and_encode(ticket)

    async def _read_and_encode(self, ticket: Ticket) -> Response:
        arrived = time.monotonic()
        settings = self._server.settings
        asked = self._asked_timeout()
        try:
            # Never longer than by default: a body that trickles in holds a place, and room for all of it.
            async with asyncio.timeout(min(asked or settings.timeout_s, settings.timeout_s)):
                body, media = await read_encode(
                    self._http, self._server.pools.preproc, settings.max_body_mb << 20, settings.max_items
                )
        except TimeoutError:
            raise DeadlineExceeded("the request's time was up before its body had arrived") from None
        self._req_id = body.req_id or uuid.uuid4().hex
        self._items = len(media)
        timeout = min(body.timeout_s or asked or settings.timeout_s, settings.max_timeout_s)
        request = self._request(body, media, self._req_id, arrived + timeout, ticket)
        self._modality = request.modality
        part = Part(self._req_id, body.part_idx, body.num_parts, request.modality, self._server.model_name)
        with contextlib.ExitStack() as held:
            if body.prefill_host is not None:
                held.enter_context(self._server.active.hold(self._req_id, body.part_idx))
            delivery: Delivery | None = None
            try:
                async with until_caller_goes(self._http):
                    delivery = await self._found(request, body, media, held)
                    return await self._bounded(request, part, delivery)
            except CallerGone:
                raise
            except Exception as error:
                known = error
                if not isinstance(known, EncodeError):
                    log.exception("request %s failed", self._req_id)
                    known = EncodeError("an internal error, see the server's log")
                if delivery is not None:
                    await delivery.fail(part, known)
                raise known from None

    def _asked_timeout(self) -> float | None:
        """Seconds from the header, for callers that set deadlines without touching bodies."""
        value = self._http.headers.get(TIMEOUT_HEADER)
        if value is None:
            return None
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise BadRequest(f"the header {TIMEOUT_HEADER} is {value!r}, expected seconds above 0")
        return seconds

    def _request(
        self, body: EncodeBody, media: list[MediaItem], req_id: str, deadline: float, ticket: Ticket
    ) -> EncodeRequest:
        settings = self._server.settings
        if body.part_idx >= body.num_parts:
            raise BadRequest(f"part_idx is {body.part_idx}, expected less than num_parts, {body.num_parts}")
        ticket.weigh(nbytes=sum(len(item.source) for item in media) - ticket.bytes)
        modality = body.checked_modality()
        if modality is Modality.VIDEO and settings.video_fps is not None:
            media = [item.with_fps(settings.video_fps) for item in media]
        return EncodeRequest(req_id, modality, media, deadline, ticket, stages=self._stages)

    async def _found(
        self, request: EncodeRequest, body: EncodeBody, media: list[MediaItem], held: contextlib.ExitStack
    ) -> Delivery | None:
        """`_delivery` in the request's time: a name server may take for ever."""
        try:
            async with asyncio.timeout(request.remaining_s):
                return await self._delivery(body, media, held)
        except TimeoutError:
            raise DeadlineExceeded("the request's time was up before its destination was found") from None

    async def _delivery(self, body: EncodeBody, media: list[MediaItem], held: contextlib.ExitStack) -> Delivery | None:
        """Where the embedding goes, or None when it goes back in the answer. `held` is left when the request ends."""
        if body.delivery == "ec_store":
            return self._stored(body, media)
        if self._server.settings.engine == "sglang" and body.prefill_host is not None:
            return await self._to_sglang(body, body.prefill_host, held)
        if (body.prefill_host is None) != (body.embedding_port is None):
            raise BadRequest("prefill_host and embedding_port go together: one is missing")
        if body.prefill_host is None or body.embedding_port is None:
            return None
        if isinstance(body.embedding_port, list):
            raise BadRequest("embedding_port is a list, which only a server with --engine sglang takes")
        endpoint = await self._server.destinations.endpoint(body.prefill_host, body.embedding_port)
        return NativePush(self._server.pusher, endpoint, self._server.pools.send)

    async def _to_sglang(self, body: EncodeBody, host: str, held: contextlib.ExitStack) -> Delivery:
        if body.embedding_port is None:
            if body.req_id is None:
                raise BadRequest("prefill_host without embedding_port waits for registrations, which need a req_id")
            return held.enter_context(self._server.sglang.to_registered(body.req_id))
        ports = body.embedding_port if isinstance(body.embedding_port, list) else [body.embedding_port]
        endpoints = [await self._server.destinations.endpoint(host, port) for port in ports]
        return self._server.sglang.to_endpoints(endpoints)

    def _stored(self, body: EncodeBody, media: list[MediaItem]) -> Delivery:
        if body.prefill_host is not None or body.embedding_port is not None:
            raise BadRequest("delivery is 'ec_store', which goes without prefill_host and embedding_port")
        if self._server.store is None:
            raise Forbidden("delivery is 'ec_store', but this server has no store: it was started without --ec-store")
        return self._server.store.delivery([item.uuid for item in media])

    async def _bounded(self, request: EncodeRequest, part: Part, delivery: Delivery | None) -> Response:
        try:
            async with asyncio.timeout(request.remaining_s):
                encoded = await self._server.pipeline.encode(request)
                started = time.perf_counter()
                if delivery is None:
                    response = await self._respond(request, encoded)
                else:
                    with self._server.undelivered.hold(encoded.nbytes):
                        await delivery.deliver(part, encoded)
                    silent = isinstance(delivery, SGLangPush)
                    response = answers.nothing() if silent else answers.delivered(request.req_id, encoded)
                delivered_s = time.perf_counter() - started
                request.spent("deliver", delivered_s)
                self._server.metrics.stage.labels("deliver").observe(delivered_s)
        except TimeoutError:
            raise DeadlineExceeded("the request's time was up before its embedding was delivered") from None
        self._tokens = encoded.shape[0]
        self._server.metrics.items.labels(request.modality).inc(len(encoded.items))
        self._server.metrics.tokens.labels(request.modality).inc(self._tokens)
        return response

    async def _respond(self, request: EncodeRequest, encoded: Encoded) -> Response:
        binary = answers.OCTETS in self._http.headers.get("accept", "")
        build = answers.safetensors_answer if binary else answers.json_answer
        build = counted(self._server.metrics, "deliver", build)
        content = await copy(self._server.pools.send, encoded.nbytes, build, request.req_id, encoded)
        kind = answers.OCTETS if binary else answers.JSON
        if len(content) <= answers.PIECE:
            return Response(content, media_type=kind)
        hold = self._server.undelivered.hold(len(content))
        return answers.LargeAnswer(content, kind, hold, self._server.settings.send_timeout_s)
