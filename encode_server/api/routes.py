"""The HTTP routes: parse, hand to the pipeline, answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from encode_server import __version__
from encode_server.api import answers
from encode_server.api.body import read_encode
from encode_server.api.schemas import EncodeBody, openapi_components
from encode_server.delivery.frames import EmbeddingHeader, ErrorInfo, encode_header
from encode_server.engine.group import GroupLost
from encode_server.errors import BadRequest, DeadlineExceeded, EncodeError, NotReady
from encode_server.pipeline.pools import run_to_end
from encode_server.pipeline.request import Encoded, EncodeRequest
from encode_server.server import Server
from encode_server.telemetry.logs import log_request

CALLER_GONE = 499  # nobody reads it; the word of nginx for it, in logs and metrics


def build_router(server: Server) -> APIRouter:
    """All routes of one server."""
    router = APIRouter()
    references, _ = openapi_components()

    def body_of(name: str) -> dict[str, Any]:
        return {"content": {answers.JSON: {"schema": references[name]}}}

    encode_docs = {
        "requestBody": body_of("EncodeBody") | {"required": True},
        "responses": {
            "200": {
                "description": "The embedding, or the receipt of its delivery",
                "content": {
                    answers.JSON: {"schema": {"anyOf": [references["Answer"], references["Delivered"]]}},
                    answers.OCTETS: {"schema": {"type": "string", "format": "binary"}},
                },
            },
            **{
                str(status): body_of("ErrorAnswer") | {"description": text}
                for status, text in {
                    400: "Malformed request, or media that cannot be decoded",
                    403: "A source or destination that is not allowed",
                    413: "Above a limit",
                    415: "The model lacks the modality",
                    429: "Too busy; see Retry-After",
                    500: "The encoder failed on an item",
                    502: "The delivery failed",
                    503: "Not ready",
                    504: "The deadline passed",
                }.items()
            },
        },
    }

    @router.post("/encode", openapi_extra=encode_docs, summary="Encode images, videos or audio")
    async def encode(request: Request) -> Response:
        return await _Encode(server, request).answer()

    @router.get("/health", summary="A real encode, or the progress of one")
    @router.get("/health_generate", include_in_schema=False)
    async def health() -> Response:
        verdict = await server.health()
        return Response(msgspec.json.encode(verdict.document), 200 if verdict.healthy else 503, media_type=answers.JSON)

    @router.get("/livez", summary="Whether the process answers")
    async def livez() -> dict[str, str]:
        return {"status": "alive", "version": __version__}

    @router.get("/readyz", summary="Whether requests are taken")
    async def readyz() -> Response:
        reason = server.not_ready()
        document = {"status": "not ready" if reason else "ready", "reason": reason}
        return Response(msgspec.json.encode(document), 503 if reason else 200, media_type=answers.JSON)

    @router.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(server.render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


class _Encode:
    """One `POST /encode`, from its body to its answer."""

    def __init__(self, server: Server, http: Request) -> None:
        self._server, self._http = server, http
        self._req_id: str | None = None
        self._stages: dict[str, float] = {}
        self._modality, self._items, self._tokens = "unknown", 0, 0

    async def answer(self) -> Response:
        started = time.perf_counter()
        outcome = "ok"
        try:
            with self._server.admission.admit():
                response = await self._admitted()
        except EncodeError as error:
            outcome = error.code
            response = answers.error_answer(error, self._req_id)
        except _CallerGone:
            outcome = "gone"
            response = Response(status_code=CALLER_GONE)
        self._server.metrics.requests.labels(self._modality, outcome).inc()
        self._stages["total"] = time.perf_counter() - started
        log_request(self._req_id or "-", self._modality, outcome, self._items, self._tokens, self._stages)
        return response

    async def _admitted(self) -> Response:
        if reason := self._server.not_ready():
            raise NotReady(reason, headers={"Retry-After": "2"})
        settings = self._server.settings
        body, media = await read_encode(self._http, self._server.pools.preproc, settings.max_body_mb << 20)
        self._req_id = body.req_id or uuid.uuid4().hex
        if len(media) > settings.max_items:
            raise BadRequest(f"mm_items holds {len(media)} items, at most {settings.max_items} are taken")
        if body.part_idx >= body.num_parts:
            raise BadRequest(f"part_idx is {body.part_idx}, expected less than num_parts, {body.num_parts}")
        if (body.prefill_host is None) != (body.embedding_port is None):
            raise BadRequest("prefill_host and embedding_port go together: one is missing")
        request = EncodeRequest(
            self._req_id,
            body.checked_modality(),
            media,
            deadline=time.monotonic() + min(body.timeout_s or settings.timeout_s, settings.max_timeout_s),
            stages=self._stages,
        )
        self._modality, self._items = request.modality, len(media)
        try:
            async with _until_caller_goes(self._http), asyncio.timeout(request.remaining_s):
                return await self._encode(body, request)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the request's time was up after {body.timeout_s or settings.timeout_s:g} s"
            ) from None
        except GroupLost as lost:
            raise NotReady(f"the encoder is not available: {lost}") from None

    async def _encode(self, body: EncodeBody, request: EncodeRequest) -> Response:
        if body.prefill_host is None or body.embedding_port is None:
            async with self._server.pipeline.encode(request) as encoded:
                return await self._respond(request, encoded)
        endpoint = await self._server.destinations.endpoint(body.prefill_host, body.embedding_port)
        try:
            async with self._server.pipeline.encode(request) as encoded:
                await self._push(body, request, encoded, endpoint)
                return answers.delivered(request.req_id, encoded)
        except EncodeError as error:
            await self._push_error(body, request, endpoint, error)
            raise

    async def _respond(self, request: EncodeRequest, encoded: Encoded) -> Response:
        started = time.perf_counter()
        binary = answers.OCTETS in self._http.headers.get("accept", "")
        build = answers.safetensors_answer if binary else answers.json_answer
        content = await run_to_end(self._server.pools.send, build, request.req_id, encoded)
        self._delivered(request, encoded, started)
        return Response(content, media_type=answers.OCTETS if binary else answers.JSON)

    async def _push(self, body: EncodeBody, request: EncodeRequest, encoded: Encoded, endpoint: str) -> None:
        started = time.perf_counter()
        header = EmbeddingHeader(
            req_id=request.req_id,
            model=encoded.model,
            modality=encoded.modality,
            part_idx=body.part_idx,
            num_parts=body.num_parts,
            dtype=encoded.dtype,
            shape=encoded.shape,
            items=[item.info for item in encoded.items],
        )
        data = await run_to_end(self._server.pools.send, encoded.contiguous)
        await self._server.pusher.push(endpoint, [encode_header(header), data])
        self._delivered(request, encoded, started)

    async def _push_error(self, body: EncodeBody, request: EncodeRequest, endpoint: str, error: EncodeError) -> None:
        """Tell the waiting destination too, as far as it listens."""
        header = EmbeddingHeader(
            req_id=request.req_id,
            model=self._server.model_name,
            modality=request.modality,
            part_idx=body.part_idx,
            num_parts=body.num_parts,
            error=ErrorInfo(error.status, error.code, error.message),
        )
        with contextlib.suppress(EncodeError):
            await self._server.pusher.push(endpoint, [encode_header(header)])

    def _delivered(self, request: EncodeRequest, encoded: Encoded, started: float) -> None:
        request.spent("deliver", time.perf_counter() - started)
        self._tokens = encoded.shape[0]
        self._server.metrics.items.labels(request.modality).inc(len(encoded.items))
        self._server.metrics.tokens.labels(request.modality).inc(self._tokens)


class _CallerGone(Exception):
    """The client closed its connection; what it asked for is not wanted any more."""


@contextlib.asynccontextmanager
async def _until_caller_goes(http: Request) -> AsyncIterator[None]:
    """Cancel the body of the `async with`, and raise _CallerGone, when the client disconnects."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await http.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise _CallerGone from None
        raise
    finally:
        watcher.cancel()
