"""SGLang's own route: a prefill rank says where it receives a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from encode_server.delivery.destinations import DestinationPolicy
from encode_server.delivery.sglang.registrations import Offer, Registrations
from encode_server.errors import BadRequest
from encode_server.runtime.bodies import read_small

MAX_RECEIVERS = 64  # ranks of one prefill; each costs a socket and a push


class ReceiveUrl(msgspec.Struct):
    """`POST /scheduler_receive_url`: one rank's PULL socket, `host:port`, and how many ranks want this part."""

    req_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    receive_url: Annotated[str, msgspec.Meta(max_length=300)]
    receive_count: Annotated[int, msgspec.Meta(ge=1, le=MAX_RECEIVERS)]


def add_sglang_routes(
    router: APIRouter,
    registrations: Callable[[], Registrations],
    policy: DestinationPolicy,
    check_key: Callable[[Request], str],
) -> None:
    """Add the route to the server's others. `check_key` raises Unauthorized."""

    @router.post("/scheduler_receive_url", summary="A prefill rank says where it receives a part (SGLang)")
    async def scheduler_receive_url(request: Request) -> Response:
        client = check_key(request)
        body = await read_small(request, ReceiveUrl)
        host, port = _split(body.receive_url)
        endpoint = await policy.endpoint(host, port, "receive_url", client)
        registrations().register(body.req_id, Offer(endpoint, client), body.receive_count)
        return Response(b"null", media_type="application/json")


def _split(receive_url: str) -> tuple[str, int]:
    host, _, port = receive_url.removeprefix("tcp://").rpartition(":")
    if not 0 < len(host) < 256 or not port.isascii() or not port.isdigit() or len(port) > 5:
        raise BadRequest(f"receive_url is {receive_url[:300]!r}, expected host:port")
    return host, int(port)
