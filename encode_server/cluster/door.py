"""What stands before the encoders on a Ray cluster: it admits and reads a request, names its content, and asks again
where an encoder is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from encode_server.api.answers import error_answer
from encode_server.client.affinity import item_key
from encode_server.cluster.metrics import merged
from encode_server.errors import EncodeError, NoRoute, NotReady
from encode_server.pipeline.admission import Admission, AdmissionLimits
from encode_server.runtime.bodies import declared_length, read_all
from encode_server.runtime.caller import CALLER_GONE, CallerGone
from encode_server.service.keys import ApiKeys

log = logging.getLogger(__name__)

HELD_BYTES = 64 << 20  # an answer up to this size is held until it is whole, so that a lost encoder can be replaced
PAUSE_S = 0.2
METRICS = "text/plain; version=0.0.4; charset=utf-8"
ENCODES = ("/encode", "/v1/embeddings")
PROBES = (("GET", "/health"), ("GET", "/readyz"))
READS = (("GET", "/v1/models"), ("GET", "/server_info"), ("GET", "/openapi.json"))
UNAVAILABLE = 503  # the answer of an encoder that is leaving, or whose ranks are being restarted
IN_THREAD_BYTES = 1 << 20  # reading a body of this size takes some milliseconds


class _Items(msgspec.Struct):
    mm_items: list[Any] = []


@dataclass(frozen=True)
class DoorOptions:
    """`max_requests`, `max_inflight_bytes`: requests in progress and their bodies, in all; `client_share`: of both, for
    one client. `least_rate`: bytes a second of a body. `retry_s`: how long a request is tried again while encoders are
    lost. `by_content`: whether the same content goes to the same encoder."""

    api_keys: tuple[str, ...]
    max_requests: int
    max_inflight_bytes: int
    max_body_bytes: int
    client_share: float
    least_rate: int
    retry_s: float
    by_content: bool


class Door:
    """The ingress deployment."""

    def __init__(self, encoders: DeploymentHandle, options: DoorOptions) -> None:
        self._encoders = encoders.options(stream=True, method_name="handle")
        self._all, self._options = encoders, options
        self._keys = ApiKeys(options.api_keys)
        limits = AdmissionLimits(options.max_requests, options.max_inflight_bytes, 1, options.client_share)
        self._admission = Admission(limits)

    async def __call__(self, request: Request) -> Response:
        """Answer as one encoder would."""
        path = request.url.path
        try:
            if path == "/livez":
                return Response(b'{"status":"alive"}', media_type="application/json")
            if path == "/metrics":
                return await self._metrics()
            if (request.method, path) in PROBES:
                return await self._answer(_scope(request), b"")
            client = self._keys.client(request)
            if (request.method, path) in READS:
                return await self._answer(_scope(request), b"")
            if request.method != "POST" or path not in ENCODES:
                raise NoRoute(
                    f"{request.method} {path}: on a Ray cluster there is no one server to answer it", 404, None
                )
            options = self._options
            with self._admission.admit(client, declared_length(request)) as ticket:
                body = (await read_all(request, options.max_body_bytes, options.least_rate, ticket.grow)).take()
                return await self._answer(_scope(request), body)
        except CallerGone:
            return Response(status_code=CALLER_GONE)
        except EncodeError as error:
            return error_answer(error, None)

    async def _answer(self, scope: dict[str, Any], body: bytes) -> Response:
        """Ask an encoder; ask another one while encoders are lost before their answer is whole."""
        encoders = self._encoders
        if self._options.by_content and body:
            key = await asyncio.to_thread(content_key, body) if len(body) > IN_THREAD_BYTES else content_key(body)
            encoders = encoders.options(session_id=key)
        # A probe is answered as things are.
        deadline = time.monotonic() + (self._options.retry_s if body else 0.0)
        while True:
            try:
                messages = encoders.remote(scope, body)
                head, pieces, nbytes = await anext(messages), [], 0
                async for message in messages:
                    pieces.append(message.get("body", b""))
                    nbytes += len(pieces[-1])
                    if nbytes > HELD_BYTES:
                        break
                if head["status"] != UNAVAILABLE or time.monotonic() > deadline:
                    break
            except RayTaskError:
                raise  # a fault of the encoder's code, which another encoder has, too
            except (RayError, DeploymentUnavailableError) as lost:
                if time.monotonic() > deadline:
                    raise NotReady(f"encoders were lost for {self._options.retry_s:g} s") from None
                log.warning("an encoder was lost, its request goes to another one: %s", type(lost).__name__)
            await asyncio.sleep(PAUSE_S)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head["headers"]}
        if nbytes <= HELD_BYTES:
            return Response(b"".join(pieces), head["status"], headers)
        return StreamingResponse(_rest(pieces, messages), head["status"], headers)

    async def _metrics(self) -> Response:
        """The metrics of every encoder."""
        text = merged(dict(await self._all.broadcast("metrics").results_async()))
        return Response(text, headers={"Content-Type": METRICS})


def content_key(body: bytes) -> str:
    """A name for what a request wants encoded. Of several items the first counts: the caches are per item, and a
    request goes to one encoder."""
    try:
        items = msgspec.json.decode(body, type=_Items).mm_items
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return blake2b(body, digest_size=16).hexdigest()  # a form, or something that the encoder will refuse
    if not items:
        return blake2b(body, digest_size=16).hexdigest()  # `/v1/embeddings`
    first = items[0]
    content = first.get("content_hash") or first.get("url") if isinstance(first, dict) else first
    return item_key(str(content)).hex()


def _scope(request: Request) -> dict[str, Any]:
    """What of an ASGI scope another process can take."""
    given = request.scope
    names = (
        "type",
        "http_version",
        "method",
        "scheme",
        "path",
        "raw_path",
        "query_string",
        "headers",
        "client",
        "server",
    )
    return {name: given[name] for name in names if name in given} | {"root_path": "", "asgi": {"version": "3.0"}}


async def _rest(pieces: list[bytes], messages: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    async for message in messages:
        yield message.get("body", b"")
