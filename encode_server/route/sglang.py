"""The proxy's face towards SGLang: one encoder, behind which there are many.

Embeddings never pass through here: an encoder pushes them to the prefill's ranks, whose registrations are forwarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from encode_server.api.answers import error_answer
from encode_server.client.affinity import item_key
from encode_server.client.encoders import Encoders
from encode_server.client.http import Answer
from encode_server.client.media import Item, Written
from encode_server.delivery.active import ActiveParts
from encode_server.delivery.destinations import DestinationPolicy
from encode_server.delivery.sglang.endpoints import ReceiveUrl
from encode_server.delivery.sglang.registrations import Accepts, Offer, Registrations
from encode_server.delivery.undelivered import Undelivered
from encode_server.errors import DeadlineExceeded, EncodeError
from encode_server.route.chat import LIMITS
from encode_server.route.fleet import Fleet
from encode_server.route.parts import Journey, PartRelay, PartRequest
from encode_server.route.telemetry import RouteMetrics, note
from encode_server.runtime.bodies import read_all, read_small
from encode_server.runtime.caller import CALLER_GONE, CallerGone, until_caller_goes
from encode_server.runtime.outline import outline
from encode_server.runtime.pools import Pace, run_sized

ATTEMPTS = 6
JSON = "application/json"


class PartBody(msgspec.Struct):
    """What is read of `POST /encode`; the encoder reads the rest."""

    req_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    mm_items: Annotated[list[Any], msgspec.Meta(min_length=1)]
    prefill_host: str | None = None
    embedding_port: Any = None
    part_idx: int = 0


class EncoderUrl(msgspec.Struct):
    """`/register_encoder_url` and `/unregister_encoder_url`, as SGLang's bootstrap server has them."""

    url: Annotated[str, msgspec.Meta(min_length=1, max_length=2048)]


class SGLangFace:
    """`POST /encode` and `POST /scheduler_receive_url` for a whole fleet."""

    def __init__(
        self,
        encoders: Encoders,
        fleet: Fleet,
        policy: DestinationPolicy,
        metrics: RouteMetrics,
        *,
        pool: Executor,
        timeout_s: float,
        max_body_bytes: int,
        max_waiting_bytes: int,
        least_rate: int,
    ) -> None:
        """`policy`: hosts beside a prefill's own where its ranks may receive. `max_waiting_bytes`: of the bodies in
        progress; a caller beyond that waits, its body unread. `least_rate`: bytes a second of a body at least."""
        self._fleet, self._policy, self._pool = fleet, policy, pool
        self._timeout_s, self._max_body_bytes, self._least_rate = timeout_s, max_body_bytes, least_rate
        self._registrations = Registrations()
        self._active = ActiveParts()
        self.held = Undelivered(max_waiting_bytes, share=1.0)
        self._relay = PartRelay(
            encoders, self._registrations, ATTEMPTS, lambda reason: metrics.part_failures.labels(reason).inc()
        )

    def add_routes(self, router: APIRouter) -> None:
        """Add them to the proxy's others."""
        for path, method, endpoint in (
            ("/encode", "POST", self.encode),
            ("/scheduler_receive_url", "POST", self.scheduler_receive_url),
            ("/register_encoder_url", "POST", self.register),
            ("/unregister_encoder_url", "DELETE", self.unregister),
            ("/list_encoder_urls", "GET", self.list_encoders),
        ):
            router.add_api_route(path, _answered(endpoint), methods=[method], response_model=None)

    async def encode(self, request: Request) -> Response:
        """One part: an encoder's answer to it."""
        deadline = time.monotonic() + self._timeout_s
        declared = request.headers.get("content-length", "")
        size = int(declared) if declared.isascii() and declared.isdigit() else self._max_body_bytes
        async with contextlib.AsyncExitStack() as held:
            room = self.held.hold(min(size, self._max_body_bytes), _client(request), patient=True)
            try:
                async with asyncio.timeout(self._timeout_s):
                    await held.enter_async_context(room)
            except TimeoutError:
                raise DeadlineExceeded(f"no room for the request's body within {self._timeout_s:g} s") from None
            raw = (await read_all(request, self._max_body_bytes, self._least_rate, pool=self._pool)).whole()
            found = await run_sized(self._pool, Pace.JSON, len(raw), outline, raw, PartBody, LIMITS)
            body = found.body
            part = PartRequest(
                req_id=body.req_id,
                body=memoryview(raw),
                key=part_key(body.mm_items, found.written),
                items=len(body.mm_items),
                registers=body.embedding_port is None,
                deadline=deadline,
                accepts=self._accepts(body.prefill_host or "", _client(request)),
            )
            return await self._delivered(request, part, body)

    def _accepts(self, host: str, client: str) -> Accepts:
        """Whoever knows a req_id may register for it. What counts is at the prefill's host, comes from where the part
        came from, or is in a network that the operator named."""
        own = host.strip("[]")

        def accepts(offer: Offer) -> bool:
            if offer.address == own or offer.client == client:
                return True
            with contextlib.suppress(ValueError):  # a name, not an address
                return self._policy.named(offer.address)
            return False

        return accepts

    async def _delivered(self, request: Request, part: PartRequest, body: PartBody) -> Response:
        journey, host = Journey(), body.prefill_host or ""
        with self._active.hold(body.req_id, body.part_idx, host):
            try:
                async with until_caller_goes(request):
                    answer = await self._relay.deliver(part, journey)
                    response = _response(answer)
            except EncodeError as error:
                response = error_answer(error, body.req_id)
            finally:
                note(request.scope, req=body.req_id, items=part.items, encoder=journey.encoder)
                note(request.scope, failures=journey.failures)
            if response.status_code != 200:
                # The error ends the prefill's other requests, too: let what is on its way arrive there first.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, part.deadline - time.monotonic())):
                        await self._active.others_ended(body.req_id, body.part_idx, host)
            return response

    async def scheduler_receive_url(self, request: Request) -> Response:
        """A prefill rank says where it receives a part; the encoder that has the part is told."""
        body = await read_small(request, ReceiveUrl)
        note(request.scope, req=body.req_id)
        self._registrations.register(body.req_id, Offer(body.receive_url, _client(request)), body.receive_count)
        return Response(b"null", media_type=JSON)

    async def register(self, request: Request) -> Response:
        """An encoder says where it is."""
        await self._fleet.register((await read_small(request, EncoderUrl)).url)
        return Response(b"OK")

    async def unregister(self, request: Request) -> Response:
        """An encoder leaves."""
        self._fleet.unregister((await read_small(request, EncoderUrl)).url)
        return Response(b"OK")

    async def list_encoders(self, request: Request) -> Response:
        """Who is registered."""
        return Response(msgspec.json.encode({"encoder_urls": self._fleet.registered}), media_type=JSON)

    def close(self) -> None:
        """Forget all registrations."""
        self._registrations.close()


def part_key(items: list[Any], written: Callable[[str], memoryview | None]) -> bytes:
    """Which encoder a part belongs to: the owner of its first item. A conversation's later turns begin with the same
    image, and the key is that of the same image in a chat request."""
    first = items[0]
    source = first.get("url") if isinstance(first, dict) else first
    if not isinstance(source, str):
        return item_key(msgspec.json.encode(first))
    json = written(source)
    return item_key(source if json is None else Item(Written(json)))


def _answered(endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """The endpoint with its errors as answers."""

    async def answer(request: Request) -> Response:
        try:
            response: Response = await endpoint(request)
        except CallerGone:
            response = Response(status_code=CALLER_GONE)
        except EncodeError as error:
            response = error_answer(error, None)
        return response

    return answer


def _response(answer: Answer) -> Response:
    headers = {name: answer.headers[name] for name in ("Retry-After",) if name in answer.headers}
    media_type = answer.headers.get("Content-Type", JSON)
    return Response(bytes(answer.body), answer.status, headers=headers, media_type=media_type)


def _client(request: Request) -> str:
    return request.client.host if request.client else ""
