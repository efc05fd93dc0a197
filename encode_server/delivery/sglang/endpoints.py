"""SGLang's own routes: a prefill rank says where it receives a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from encode_server.delivery.destinations import DestinationPolicy
from encode_server.delivery.sglang.deliveries import SGLangDeliveries
from encode_server.delivery.sglang.registrations import Landing, Offer
from encode_server.errors import BadRequest
from encode_server.runtime.bodies import read_small
from encode_server.runtime.caller import until_caller_goes

JSON = "application/json"
MAX_RECEIVERS = 64  # ranks of one prefill; each costs a socket and a push


class ReceiveUrl(msgspec.Struct):
    """`POST /scheduler_receive_url`: one rank's PULL socket, `host:port`, and how many ranks want this part."""

    req_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    receive_url: Annotated[str, msgspec.Meta(max_length=300)]
    receive_count: Annotated[int, msgspec.Meta(ge=1, le=MAX_RECEIVERS)]


class AskSize(msgspec.Struct):
    """`POST /scheduler_receive_meta_data`: how large will this part be?"""

    req_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    part_idx: Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Land(msgspec.Struct):
    """`POST /send`: where one rank has made room for this part, and how many ranks want it."""

    req_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    prefill_host: Annotated[str, msgspec.Meta(max_length=255)]
    embedding_port: int
    session_id: Annotated[str, msgspec.Meta(max_length=300)]
    buffer_address: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    embedding_size: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    receive_count: Annotated[int, msgspec.Meta(ge=1, le=MAX_RECEIVERS)]


def add_sglang_routes(
    router: APIRouter,
    deliveries: Callable[[], SGLangDeliveries],
    policy: DestinationPolicy,
    check_key: Callable[[Request], str],
    wait_s: float,
    *,
    mooncake: bool,
) -> None:
    """Add the routes to the server's others. `check_key` raises Unauthorized. `wait_s`: how long a caller waits for a
    size, and for its embedding. `mooncake`: destinations may offer their memory."""

    @router.post("/scheduler_receive_url", summary="A prefill rank says where it receives a part (SGLang)")
    async def scheduler_receive_url(request: Request) -> Response:
        client = check_key(request)
        body = await read_small(request, ReceiveUrl)
        host, port = _split(body.receive_url)
        endpoint = await policy.endpoint(host, port, "receive_url", client)
        deliveries().registrations.register(body.req_id, Offer(endpoint, client), body.receive_count)
        return Response(b"null", media_type=JSON)

    if not mooncake:
        return

    @router.post("/scheduler_receive_meta_data", summary="How large a part will be, once that is known (SGLang)")
    async def scheduler_receive_meta_data(request: Request) -> Response:
        check_key(request)
        body = await read_small(request, AskSize)
        async with until_caller_goes(request):
            size = await deliveries().sizes.ask(body.req_id, wait_s)
        answer = {
            "req_id": body.req_id,
            "part_idx": body.part_idx,
            "embedding_size": size.nbytes,
            "embedding_len": size.rows,
            "embedding_dim": size.dim,
        }
        return Response(msgspec.json.encode(answer), media_type=JSON)

    @router.post("/send", summary="A prefill rank says where it has made room for a part (SGLang)")
    async def send(request: Request) -> Response:
        client = check_key(request)
        body = await read_small(request, Land)
        endpoint = await policy.endpoint(body.prefill_host, body.embedding_port, client=client)
        host, port = _split(body.session_id, "session_id")
        # The embedding goes where the header goes: a policy that allows the one must not be led to another host.
        session = (await policy.endpoint(host, port, "session_id", client)).removeprefix("tcp://")
        if session.rpartition(":")[0] != endpoint.removeprefix("tcp://").rpartition(":")[0]:
            raise BadRequest("session_id names another host than prefill_host")
        landing = Landing(session, body.buffer_address, body.embedding_size)
        deliveries().registrations.register(body.req_id, Offer(endpoint, client, landing), body.receive_count)
        async with until_caller_goes(request):
            await landing.until_landed(wait_s)
        return Response(b"null", media_type=JSON)


def _split(receive_url: str, field: str = "receive_url") -> tuple[str, int]:
    host, _, port = receive_url.removeprefix("tcp://").rpartition(":")
    if not 0 < len(host) < 256 or not port.isascii() or not port.isdigit() or len(port) > 5:
        raise BadRequest(f"{field} is {receive_url[:300]!r}, expected host:port")
    return host, int(port)
