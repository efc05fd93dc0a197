"""Routes beside /encode that an engine or an operator calls: registrations of prefill ranks, profiles."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from encode_server.api.answers import JSON
from encode_server.api.schemas import PositiveInt
from encode_server.errors import BadRequest, Forbidden
from encode_server.runtime.bodies import read_small
from encode_server.service.server import Server


class ReceiveUrl(msgspec.Struct):
    """`POST /scheduler_receive_url`: one rank's PULL socket, `host:port`, and how many ranks want this part."""

    req_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    receive_url: str
    receive_count: PositiveInt


class ProfileOptions(msgspec.Struct):
    """`/start_profile`: without `num_steps` (forwards) it runs until `/stop_profile`."""

    output_dir: str | None = None
    num_steps: PositiveInt | None = None


def add_control_routes(router: APIRouter, server: Server) -> None:
    """Add them to the server's other routes."""

    @router.api_route("/start_profile", methods=["GET", "POST"], summary="Profile all ranks")
    async def start_profile(request: Request) -> Response:
        server.keys.client(request)
        options = await read_small(request, ProfileOptions)
        if options.output_dir is not None:
            raise Forbidden("output_dir is not the caller's to choose: traces go to this server's --profile-dir")
        await server.start_profile(options.num_steps)
        return Response(msgspec.json.encode({"status": "profiling"}), media_type=JSON)

    @router.api_route("/stop_profile", methods=["GET", "POST"], summary="Write the ranks' traces")
    async def stop_profile(request: Request) -> Response:
        server.keys.client(request)
        files = await server.stop_profile()
        return Response(msgspec.json.encode({"status": "stopped", "files": files}), media_type=JSON)

    if server.settings.engine != "sglang":
        return

    @router.post("/scheduler_receive_url", summary="A prefill rank says where it receives a part (SGLang)")
    async def scheduler_receive_url(request: Request) -> Response:
        server.keys.client(request)
        body = await read_small(request, ReceiveUrl)
        host, port = _split(body.receive_url)
        endpoint = await server.destinations.endpoint(host, port, "receive_url")
        server.sglang.registrations.register(body.req_id, endpoint, body.receive_count)
        return Response(b"null", media_type=JSON)


def _split(receive_url: str) -> tuple[str, int]:
    host, _, port = receive_url.removeprefix("tcp://").rpartition(":")
    if not 0 < len(host) < 256 or not port.isascii() or not port.isdigit() or len(port) > 5:
        raise BadRequest(f"receive_url is {receive_url[:300]!r}, expected host:port")
    return host, int(port)
